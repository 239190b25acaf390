"""What a train step keeps of each layer: compiled memory, and the same gradients."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from lora_jax import InputError, LoraConfig, QuantConfig, init_adapter, lora_linen
from lora_jax.lora import KernelLayout
from lora_jax.models import CausalLM, ModelConfig, abstract_params
from lora_jax.models._decoder import REMAT_POLICIES
from lora_jax.optim import freeze_base
from lora_jax.train import init_state, make_step

BATCH, SEQ = 2, 64
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
CARRY = BATCH * SEQ * CONFIG.hidden_size * 4
WATCH = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def train_step(remat, layers=2, tx: Any = WATCH, quant=None) -> tuple[Any, Any]:
    """A step, and the shapes it takes."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
    base = abstract_params(config, quant=quant)
    make = functools.partial(init_adapter, base_params=base, config=LORA, layouts=LAYOUTS)
    state = jax.eval_shape(lambda key: init_state(make(key), tx, key), jax.random.key(0))
    batches = {
        name: jax.ShapeDtypeStruct((1, BATCH, SEQ), dtype)
        for name, dtype in (
            ("input_ids", jnp.int32),
            ("positions", jnp.int32),
            ("segment_ids", jnp.int32),
            ("loss_mask", jnp.bool_),
        )
    }
    return make_step(lora_linen(CausalLM(config, remat=remat)), tx, chunk=32), (
        state,
        base,
        batches,
    )


@functools.cache
def carries_per_layer(remat, quantized=False):
    """Temporaries that one more layer costs beyond its adapter's float32 gradient, in carries."""
    tx = freeze_base(optax.adamw(1e-3))
    sizes = []
    for layers in (4, 12):
        step, shapes = train_step(remat, layers, tx, QuantConfig() if quantized else None)
        memory = step.lower(*shapes).compile().memory_analysis()
        gradients = sum(4 * x.size for x in jax.tree.leaves(shapes[0].trainable))
        sizes.append(memory.temp_size_in_bytes - gradients)
    return (sizes[1] - sizes[0]) / 8 / CARRY


@pytest.mark.slow
def test_policies_keep_more_and_more():
    order = ["nothing", "names", "dots", "everything"]
    kept = [carries_per_layer(name) for name in order]
    assert kept == sorted(kept) and len(set(kept)) == 4, kept
    # The input, attention's output and its log-sum-exp, and the sum behind it.
    lse = CONFIG.num_attention_heads / CONFIG.hidden_size
    assert kept[1] == pytest.approx(3 + lse, abs=0.01)
    # The products once, although an adapter makes each of two: q, k, v, o, gate and up.
    assert kept[2] <= 1 + 1 + 0.5 + 0.5 + 1 + 4 + 4


@pytest.mark.parametrize(
    "quantized",
    [
        pytest.param(False, id="dense"),
        pytest.param(True, id="nf4", marks=pytest.mark.slow),
    ],
)
def test_nothing_keeps_one_carry_of_each_layer(quantized):
    """No dense copy of a quantized stack, no second copy of the base, no mask for each layer."""
    assert carries_per_layer("nothing", quantized) <= 1.05


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_offload_sends_the_names_and_the_input_to_the_host(platform):
    """CPUs have no other memory to send to, and XLA leaves the transfers out there."""
    step, shapes = train_step("offload", 12)
    traced = step.trace(*shapes)
    stacks = re.findall(r"f32<host>\[12,\S+?\]", str(traced.jaxpr))
    carry, by_head = f"{BATCH},{SEQ},{CONFIG.hidden_size}", f"{BATCH},2,2,{SEQ}"
    shapes = {carry, f"{by_head},{CONFIG.head_dim}", f"{by_head},1"}
    assert set(stacks) == {f"f32<host>[12,{shape}]" for shape in shapes}
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    placed = re.findall(r'_xla_buffer_placement = "(\w+)"', text)
    assert sorted(set(placed)) == ["device", "pinned_host"] and placed.count("pinned_host") == 4
    # The forward scan stacks nothing else: its carries are no longer kept on the device.
    forward = next(e for e in scans(traced.jaxpr.jaxpr) if e.params["length"] == 12)
    stacked = [v.aval for v in forward.outvars if v.aval.shape[:2] == (12, BATCH)]
    assert len(stacked) == 4 and all("host" in str(x) for x in stacked)


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["dense", "nf4"])
def test_nothing_large_is_computed_before_the_layers(quant):
    """What a layer computes from constants alone JAX moves before the scan, and keeps."""
    step, shapes = train_step("nothing", 12, quant=quant)
    for scan in scans(step.trace(*shapes).jaxpr.jaxpr):
        if scan.params["length"] == 12:
            # JAX 0.12 counts them in a tree of constants, carry and slices.
            known = scan.params.get("num_consts")
            if known is None:
                parts = jax.tree.leaves(scan.params["ft_in"][0], is_leaf=lambda x: x is None)
                known = len(parts)
            constants = scan.invars[:known]
            sizes = [x.aval.size * x.aval.dtype.itemsize for x in constants]
            assert sum(sizes) <= 2 * CARRY, [str(x.aval) for x in constants]


def scans(jaxpr):
    """All scans in a jaxpr, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner)


@pytest.fixture(scope="module")
def gradients():
    """Loss and gradient of a step, by policy."""

    @functools.cache
    def compute(remat):
        step, (state, base, batches) = train_step(remat)
        base = _random(base)
        adapter = _random(state.trainable)
        ids = jax.random.randint(jax.random.key(2), (1, BATCH, SEQ), 0, CONFIG.vocab_size)
        batches = {
            "input_ids": ids,
            "positions": jnp.broadcast_to(jnp.arange(SEQ), ids.shape),
            "segment_ids": jnp.ones_like(ids),
            "loss_mask": ids > 20,
        }
        state, metrics = step(init_state(adapter, WATCH, jax.random.key(0)), base, batches)
        return metrics["loss"], state.opt_state

    return compute


def _random(shapes):
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"everything"}))
def test_loss_and_gradients_are_the_same(gradients, remat):
    loss, expected = gradients("everything")
    same_loss, found = gradients(remat)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
    for e, f in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        e, f = np.asarray(e, np.float64), np.asarray(f, np.float64)
        assert np.linalg.norm(e - f) <= 1e-6 * np.linalg.norm(e)


def test_unknown_policy_is_refused():
    with pytest.raises(InputError, match=r"remat: unknown policy 'nothin' \(did you mean 'nothi"):
        CausalLM(CONFIG, remat="nothin").init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
