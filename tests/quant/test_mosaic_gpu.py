"""The GPU kernels: in their interpreter, lowered and compiled for a GPU, and left out elsewhere."""

import functools
import importlib.util
import inspect
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from lora_jax import quant
from lora_jax._errors import InputError
from lora_jax._quant_config import QuantConfig
from lora_jax.quant import _gpu, _matmul, _mosaic_gpu, dequantize, quantize, quantized_matmul

CONFIGS = [
    QuantConfig(),
    QuantConfig("fp4", block_size=32, double_quant=False),
    QuantConfig("int4", block_size=128, double_quant=False, absmax_dtype="bfloat16"),
]
INTERPRETED = {"on": _mosaic_gpu.PLAIN, "interpret": InterpretGPUParams()}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def interpret(monkeypatch, *names):
    """As on a GPU, but in the interpreter."""
    for name in names:
        kernel = functools.partial(getattr(_mosaic_gpu, name), **INTERPRETED)
        monkeypatch.setattr(_mosaic_gpu, name, kernel)


@pytest.mark.parametrize(("config", "rows"), list(zip(CONFIGS, [3, 1, 1], strict=True)))
def test_product_of_a_few_rows(config, rows, monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "PROGRAMS", 2)
    q, x = quantize(normal(256, 256), config), normal(rows, 256, seed=1)
    found = _mosaic_gpu.product(x, *_gpu_arguments(q), **INTERPRETED)
    expected = x @ dequantize(q, jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.format)
def test_dense_kernels_of_a_stack(config):
    q = quantize(normal(3, 256, 128), config, stacked=1)
    found = _mosaic_gpu.dense(*_gpu_arguments(q), jnp.float32, **INTERPRETED)
    np.testing.assert_allclose(found, dequantize(q, jnp.float32), rtol=1e-6, atol=1e-7)
    rounded = _mosaic_gpu.dense(*_gpu_arguments(q), jnp.bfloat16, **INTERPRETED)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded, found, rtol=2**-8)


@pytest.mark.parametrize("scales", ["uint8", "bfloat16"])
def test_what_the_trial_expects(scales):
    blocks, expected = _mosaic_gpu._trial("nf4", scales)
    found = _mosaic_gpu.dense(blocks, "nf4", jnp.float32, **INTERPRETED)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradient_map_and_derivative_of_the_kernel_path(monkeypatch):
    interpret(monkeypatch, "product")
    stack, x = quantize(normal(2, 64, 128), stacked=1), normal(2, 3, 64, seed=1)
    one, kernel = jax.tree.map(lambda a: a[1], stack), dequantize(stack, jnp.float32)[1]

    def through(x, q):
        return _matmul._kernel(None, x, q)

    np.testing.assert_allclose(through(x, one), x @ kernel, rtol=1e-4, atol=1e-4)
    expected = jnp.einsum("nti,nio->nto", x, dequantize(stack, jnp.float32))
    np.testing.assert_allclose(jax.vmap(through)(x, stack), expected, rtol=1e-4, atol=1e-4)
    _, tangent = jax.jvp(lambda x: through(x, one), (x,), (x,))
    np.testing.assert_allclose(tangent, x @ kernel, rtol=1e-4, atol=1e-4)
    assert _matmul._TRANSPOSED["kernel"] is _matmul._TRANSPOSED["dense"]


def test_the_path_is_told(monkeypatch):
    monkeypatch.setattr(_gpu, "why_not", lambda q, dtype: None)
    q = quantize(normal(64, 128))
    told = quant.explain(normal(1, 8, 64), q, backend="gpu")
    assert (told.name, told.dense_bytes) == ("kernel", 0)
    assert quant.explain(normal(9, 64), q, backend="gpu").name == "dense"
    assert quant.explain(normal(1, 64), q, backend="cpu").name == "dense"


def test_without_a_gpu_there_are_no_kernels():
    q = quantize(normal(64, 128))
    assert _mosaic_gpu.why_not("nf4", "uint8", "bfloat16").startswith("it refuses the kernels: ")
    assert "no GPU here to try kernels on" in str(quant.explain(normal(1, 64), q, backend="gpu"))
    with pytest.raises(InputError, match="path 'kernel' is not to be had: no GPU here"):
        quantized_matmul(normal(1, 64), q, path="kernel")


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_kernels_are_tried_once_also_in_the_middle_of_tracing(off, monkeypatch):
    interpret(monkeypatch, "product", "dense")
    right = _mosaic_gpu.product
    monkeypatch.setattr(_mosaic_gpu, "product", lambda *args: right(*args) + off * 100)
    told = []

    @jax.jit
    def traced(x):
        told.append(_mosaic_gpu.why_not.__wrapped__("nf4", "uint8", "float32"))
        return x

    traced(jnp.ones(3))
    assert told == ["its kernels multiplied wrongly on trial" if off else None]


def test_what_kernels_do_not_read(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    zero_points = quantize(normal(64, 128), QuantConfig("int4", zero_point=True))
    for q in (quantize(normal(64, 100)), quantize(normal(70, 128)), zero_points):
        assert _gpu.why_not(q, jnp.float32).startswith("kernels read ")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert _gpu.why_not(quantize(normal(64, 128)), jnp.float32) == "XLA cuts no kernel over devices"


def calls(rows):
    """The two kernels, and shapes like a large model's."""
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    yield lambda x, q: _mosaic_gpu.product(x, *_gpu_arguments(q)), (x, q)
    yield lambda q: _mosaic_gpu.dense(*_gpu_arguments(q), jnp.bfloat16), (q,)


@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_lower_for_a_gpu(rows):
    for function, shapes in calls(rows):
        with jax.sharding.use_abstract_mesh(mesh_of("NVIDIA H200")):
            allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
            lowered = jax.export.export(
                jax.jit(function), platforms=["cuda"], disabled_checks=allowed
            )(*shapes)
        assert "mosaic_gpu" in lowered.mlir_module()


def test_kernels_compile_for_an_h200():
    """Down to its machine code, where JAX's CUDA plugin is there, with or without a GPU."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    device = h200()
    sharding = jax.sharding.SingleDeviceSharding(device)
    for function, shapes in calls(rows=8):
        there = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
        )
        with jax.sharding.use_abstract_mesh(mesh_of(device.device_kind)):
            memory = jax.jit(function).lower(*there).compile().memory_analysis()
        # Partial sums of 8 rows: no dense kernel beside them.
        assert memory.temp_size_in_bytes <= 16 * 2 * 8 * 14336 * 4


def _gpu_arguments(q):
    return _gpu._blocks(q), q.format


def mesh_of(kind):
    """Mosaic asks which GPU it lowers for."""
    known = {"device_kind": kind, "num_cores": None, "platform": "cuda"}
    wanted = inspect.signature(jax.sharding.AbstractDevice).parameters
    device = jax.sharding.AbstractDevice(**{k: v for k, v in known.items() if k in wanted})
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def h200():
    path = Path(__file__).parents[2] / "experiments" / "memory" / "run.py"
    spec = importlib.util.spec_from_file_location("memory_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.target_device("h200")
