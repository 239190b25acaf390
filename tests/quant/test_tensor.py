"""`QuantizedTensor` as a pytree and as a Flax parameter."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lora_jax._errors import InputError
from lora_jax._quant_config import QuantConfig
from lora_jax.quant import QuantizedTensor, dequantize, look_up, partition_specs, quantize
from tests import compiled

ROOT = Path(__file__).parents[2]
CONFIGS = [
    QuantConfig(),
    QuantConfig("int4", zero_point=True),
    QuantConfig("int8", double_quant=False, absmax_dtype="bfloat16"),
]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=[False, True], ids=["absmax", "double"])
def stack(request):
    return quantize(normal(3, 192, 16), QuantConfig(double_quant=request.param), stacked=1)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_passes_through_jit_scan_vmap_and_device_put(stack):
    dense = dequantize(stack)
    assert_same(jax.jit(lambda q: q)(stack), stack)
    assert_same(jax.device_put(stack, jax.devices()[0]), stack)
    np.testing.assert_allclose(jax.vmap(dequantize)(stack), dense, rtol=1e-6, atol=1e-6)
    _, layers = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), None, stack)
    np.testing.assert_allclose(layers, dense, rtol=1e-6, atol=1e-6)
    first = jax.tree.map(lambda x: x[0], stack)
    assert (first.shape, first.ndim) == ((192, 16), 2)
    np.testing.assert_allclose(dequantize(first), dense[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("child", [None, object(), jax.ShapeDtypeStruct((1,), jnp.uint8), "spec"])
def test_rebuilds_with_any_children(stack, child):
    leaves, structure = jax.tree.flatten(stack)
    rebuilt = jax.tree.unflatten(structure, [child] * len(leaves))
    assert isinstance(rebuilt, QuantizedTensor)
    assert rebuilt.codes is child


def test_shape_and_bytes_need_no_arrays(stack):
    shapes = jax.eval_shape(lambda q: q, stack)
    assert shapes.shape == (3, 192, 16)
    assert shapes.nbytes == stack.nbytes == sum(x.nbytes for x in jax.tree.leaves(stack))


def test_axis_metadata(stack):
    assert stack.add_axis(0, {}) is stack
    assert stack.remove_axis(0, {}) is stack
    assert stack.replace_boxed("new") == "new"
    np.testing.assert_array_equal(meta.unbox({"kernel": stack})["kernel"], dequantize(stack))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.double_quant}")
def test_rows_of_a_table(config):
    table = normal(50, 130)
    q = quantize(table, config, contracting=(1,))
    ids = jnp.array([[0, 49, 7], [7, -1, 3]])
    rows = look_up(q, ids, jnp.float32)
    np.testing.assert_allclose(rows, dequantize(q)[ids], rtol=1e-6, atol=1e-6)
    assert np.isnan(look_up(q, jnp.array([50]), jnp.bfloat16)).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.double_quant}")
def test_orbax_keeps_it(tmp_path, config):
    import orbax.checkpoint as ocp

    tree = {"kernel": quantize(normal(2, 96, 8), config, stacked=1)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved", jax.eval_shape(lambda x: x, tree))
    assert_same(restored, tree)


def test_a_flat_kernel_is_not_cut(stack):
    with pytest.raises(InputError, match="blocks run over columns"):
        partition_specs(dataclasses.replace(stack, flat=True), rows="fsdp")
    whole = partition_specs(dataclasses.replace(stack, flat=True))
    assert whole.codes == jax.sharding.PartitionSpec(None, None, None, None)


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lora_jax import QuantConfig, quantize
from lora_jax.quant import dequantize, partition_specs, quantized_matmul

mesh = Mesh(np.array(jax.devices()), ("m",))
w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1024, 64), (4, 1024)]))
for config in (QuantConfig(), QuantConfig("int4", zero_point=True, double_quant=False)):
    q = quantize(w, config)
    expected = jax.value_and_grad(lambda x: ((x @ dequantize(q)) ** 2).sum())(x)
    for cut in ({"rows": "m"}, {"columns": "m"}):
        specs = partition_specs(q, **cut)
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        q_cut, x_cut = jax.tree.map(place, q, specs), place(x, PartitionSpec(None, cut.get("rows")))
        shard = q_cut.codes.addressable_shards[0].data
        assert shard.size == q.codes.size // 8, shard.shape
        assert q_cut.scales.addressable_shards[0].data.size == q.scales.size // 8
        for path in ("dense", "split"):
            product = lambda x, q: (quantized_matmul(x, q, path=path) ** 2).sum()
            compiled = jax.jit(jax.value_and_grad(product)).lower(x_cut, q_cut).compile()
            text = compiled.as_text()
            assert "collective-permute" not in text and "all-gather" not in text, (cut, path)
            for got, want in zip(compiled(x_cut, q_cut), expected):
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (cut, path)
print("sharded as cut")
"""


@pytest.mark.slow
def test_cut_along_either_axis_on_8_devices():
    """Codes go with their scales, and a product moves neither between devices."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sharded as cut" in done.stdout


class Stack(nn.Module):
    """Dense layers under scan and remat, as somebody else would write them."""

    layers: int = 3

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return jnp.tanh(nn.Dense(x.shape[-1], use_bias=False)(x)), None

        scan = nn.scan(
            nn.remat(layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan(self, x, None)[0]


def test_stands_for_a_parameter_in_a_scanned_module():
    model, x = Stack(), normal(5, 96)
    params = compiled.init(model, jax.random.key(1), x)
    kernel = params["Dense_0"]["kernel"]
    q = quantize(kernel, stacked=1)

    def output(kernel, x):
        return compiled.apply(model, {"Dense_0": {"kernel": kernel}}, x)

    np.testing.assert_allclose(output(q, x), output(dequantize(q), x), rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x, q: output(q, x).sum()))(x, q)
    expected = jax.grad(lambda x: output(dequantize(q), x).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_another_shape_is_still_refused():
    with pytest.raises(Exception, match="shape"):
        Stack().apply(
            {"params": {"Dense_0": {"kernel": quantize(normal(3, 96, 64), stacked=1)}}},
            normal(5, 96),
        )
