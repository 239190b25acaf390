"""NNX modules with adapters in users' loops, beside Linen's, and what does not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import (
    InputError,
    LoraConfig,
    choose_rows,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    merge_adapter,
    nnx_adapter,
    nnx_layouts,
    nnx_params,
    quantize,
    stack_adapters,
    with_dropout,
    with_nnx_params,
)
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.adapters import AdapterBank, load_adapter, save_adapter
from lora_jax.lora import KernelLayout
from lora_jax.transform import LoraConstant
from tests.transform.nnx_models import IDS, KERNELS, Attention, Block, X, made, run


def test_a_whole_loop_of_the_user_s():
    model, x = Attention(nnx.Rngs(0)), X
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["mlps/1"])
    layouts = nnx_layouts(model, x)
    adapter = init_adapter(jax.random.key(1), nnx_params(model), config, layouts=layouts)
    adapted = lora_nnx(model, adapter)
    np.testing.assert_allclose(run(adapted, x), run(model, x), atol=1e-6)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(adapted, optimizer, x):
        traces.append(0)

        def loss(adapted):
            return jnp.mean(jnp.square(adapted(x) - 1))

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
        optimizer.update(adapted, grads)
        return value

    losses = [float(step(adapted, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0] and len(traces) == 1
    base = dict(leaves_with_path(nnx_params(model)))
    for path, leaf in leaves_with_path(nnx_params(adapted)):
        np.testing.assert_array_equal(leaf, base[path])
    tuned = dict(leaves_with_path(nnx_adapter(adapted)))
    assert tuned.keys() == dict(leaves_with_path(adapter)).keys()
    assert not np.array_equal(tuned["mlps/1/kernel"], base["mlps/1/kernel"])
    merged = with_nnx_params(
        model, merge_adapter(nnx_params(model), nnx_adapter(adapted), layouts=layouts)
    )
    np.testing.assert_allclose(run(merged, x), run(adapted, x), rtol=1e-5, atol=1e-5)


def test_made_inside_a_trace_of_plain_jax():
    model, inputs, layouts, adapter = made("stack")
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(adapter, state, inputs):
        adapted = lora_nnx(nnx.merge(graphdef, state), adapter, layouts=layouts)
        return jnp.sum(jnp.sin(adapted(inputs)))

    own = gradient(adapter, state, inputs)
    assert jax.tree.structure(own) == jax.tree.structure(adapter)
    assert not own["layers"]["up"]["lora_scaling"].any() and own["layers"]["up"]["lora_A"].any()


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8, name="embed")(ids)
        x = nn.relu(nn.Dense(12, name="up")(x))
        return nn.DenseGeneral((2, 3), name="out")(x)


class NnxBlocks(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.out = nnx.LinearGeneral(12, (2, 3), rngs=rngs)

    def __call__(self, ids):
        return self.out(nnx.relu(self.up(self.embed(ids))))


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_tree_as_linen_s(dora):
    linen = LinenBlocks()
    base = linen.init(jax.random.key(0), IDS)["params"]
    model = with_nnx_params(NnxBlocks(nnx.Rngs(1)), base)
    config = LoraConfig(
        r=2, target_modules=["embed", "up", "out"], use_dora=dora, init_lora_weights=False
    )
    layouts = lora_linen(linen).layouts(base, IDS)
    assert nnx_layouts(model, IDS) == layouts
    adapter = init_adapter(jax.random.key(1), nnx_params(model), config, layouts=layouts)
    expected = init_adapter(jax.random.key(1), base, config, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected)
    for own in (adapter, with_dropout(jax.random.key(5), adapter, 0.5)):
        out = lora_linen(linen).apply({"params": combine(base, own)}, IDS)
        np.testing.assert_allclose(run(lora_nnx(model, own), IDS), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "einsums", "convolutions"])
def test_an_adapter_for_each_row(name):
    model, inputs, layouts, first = made(name)
    config = LoraConfig(r=2, target_modules=KERNELS, lora_alpha=3, init_lora_weights=False)
    second = init_adapter(jax.random.key(7), nnx_params(model), config, layouts=layouts)
    slots = stack_adapters([first, second])
    rows = choose_rows(slots, jnp.array([1, -1]))
    out = run(lora_nnx(model, combine(slots, rows), layouts=layouts), inputs)
    np.testing.assert_allclose(out[1], run(model, inputs)[1], rtol=1e-5, atol=1e-5)
    alone = run(lora_nnx(model, second, layouts=layouts), inputs)
    np.testing.assert_allclose(out[0], alone[0], rtol=1e-5, atol=1e-5)


def test_layouts_of_stacks_and_experts():
    assert made("stack")[2]["layers"] == KernelLayout(stack="layers")
    assert made("stack")[2]["layers/down/kernel"] == KernelLayout((0,), "layers")
    assert made("ensemble")[2]["members/up/kernel"] == KernelLayout((0,), experts=True)
    assert made("attention")[2]["attn/out/kernel"] == KernelLayout((0, 1))
    conv = made("convolutions")[2]["conv/kernel"]
    assert conv == KernelLayout((0, 1), window=(3,), groups=2)


def test_another_adapter_takes_the_first_one_s_place():
    model, inputs, layouts, adapter = made("einsums")
    other = map_with_path(lambda path, x: -x if path.endswith("lora_B") else x, adapter)
    twice = lora_nnx(lora_nnx(model, other), adapter)
    np.testing.assert_array_equal(run(twice, inputs), run(lora_nnx(model, adapter), inputs))


def test_constants_are_neither_base_nor_trained():
    adapted = lora_nnx(made("raw")[0], made("raw")[3], layouts=made("raw")[2])
    kinds = {p[-1]: type(x) for p, x in nnx.to_flat_state(nnx.state(adapted, nnx.Param))}
    assert kinds["turned_lora_scaling"] is LoraConstant
    trained = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
    assert {p[-1].rpartition("_")[2] for p, _ in trained} == {"A", "B"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: lora_nnx(nn.Dense(3)), "there is lora_linen"),
        (lambda m: lora_linen(m), "there is lora_nnx"),
        (lambda m: lora_nnx(m, {"gone": {"lora_A": jnp.ones((8, 2))}}), "another structure"),
        (lambda m: lora_nnx(m, {"up": {"kernels": jnp.ones((8, 2))}}), "another structure"),
        (lambda m: lora_nnx(m, {"up": {"lora_A": jnp.ones((8, 2))}}), "lacks up/lora_B"),
        (
            lambda m: lora_nnx(
                m,
                {
                    "up": {
                        "lora_A": jnp.ones((9, 2)),
                        "lora_B": jnp.ones((2, 12)),
                        "lora_scaling": jnp.ones(()),
                    }
                },
            ),
            "another base",
        ),
        (lambda m: with_nnx_params(m, {"up": {"kernel": jnp.ones((3, 3))}}), "this module's"),
        (lambda m: with_nnx_params(m, {"up": {"weight": jnp.ones((3, 3))}}), "not there"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(InputError, match=words):
        call(Block(nnx.Rngs(0)))


def test_quantized_weights_need_the_transform():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    model.kernel.set_value(quantize(model.kernel[...]))
    with pytest.raises(InputError, match="lora_nnx"):
        model(jnp.ones((1, 64)))
    assert lora_nnx(model)(jnp.ones((1, 64))).shape == (1, 8)


@pytest.mark.parametrize("name", ["attention", "stack"])
def test_files_and_banks_serve_both(name, tmp_path):
    model, inputs, layouts, adapter = made(name)
    config = LoraConfig(r=2, target_modules=KERNELS, lora_alpha=3)
    save_adapter(tmp_path, nnx_adapter(lora_nnx(model, adapter)), config, layouts=layouts)
    loaded, read = load_adapter(tmp_path, nnx_params(model), layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    bank = AdapterBank.empty(nnx_params(model), read, slots=2, layouts=layouts)
    bank = bank.swap("one", adapter)
    adapted = lora_nnx(model, bank.overlay([None, "one"]), layouts=layouts)
    alone = run(lora_nnx(model, adapter, layouts=layouts), inputs)
    np.testing.assert_allclose(run(adapted, inputs)[1], alone[1], rtol=1e-5, atol=1e-5)
