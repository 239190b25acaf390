"""`quantized_matmul`: values, gradients, transformations, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lora_jax import quant
from lora_jax._errors import InputError
from lora_jax._quant_config import QuantConfig
from lora_jax.quant import _matmul, dequantize, quantize, quantized_matmul

KERNELS = [((96, 4, 8), 1), ((4, 24, 16), 2), ((20, 130), (1,))]
PATHS = [path for path in quant.PATHS if path != "kernel"]  # that needs a GPU


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def dense(q, dtype=jnp.float32):
    return dequantize(q, dtype).reshape(q.d_in, q.d_out)


def check_product(q):
    """Value and gradient of every path in one program, against the dense kernel's."""
    x, weights = normal(2, 7, q.d_in, seed=1), normal(2, 7, q.d_out, seed=2)
    kernel = np.asarray(dequantize(q, jnp.float32))
    features = [i for i in range(kernel.ndim) if i not in q.contracting]
    kernel = kernel.transpose(*q.contracting, *features).reshape(q.d_in, q.d_out)

    def weighted(x, q, path):
        return jnp.sum(weights * quantized_matmul(x, q, path=path))

    def products(x, q):
        return [jax.value_and_grad(weighted)(x, q, path) for path in PATHS]

    expected = np.asarray(weights) @ kernel.T
    for value, gradient in jax.jit(products)(x, q):
        np.testing.assert_allclose(value, np.sum(weights * (x @ kernel)), rtol=1e-4)
        assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig("fp4", block_size=32, double_quant=False),
        QuantConfig("int4", block_size=96, double_quant=False, absmax_dtype="bfloat16"),
        QuantConfig("int4", zero_point=True),
        QuantConfig("int8", block_size=128),
    ],
    ids=lambda c: f"{c.format}-{c.block_size}-{c.zero_point}",
)
def test_every_format_and_path(config, monkeypatch):
    monkeypatch.setattr(_matmul, "LARGEST_DENSE", 4 * 200 * 10)
    check_product(quantize(normal(200, 20), config))


@pytest.mark.parametrize(("shape", "contracting"), KERNELS)
def test_other_shapes(shape, contracting):
    check_product(quantize(normal(*shape), contracting=contracting))


def test_a_large_kernel_is_dense_in_slabs(monkeypatch):
    """No more than one slab at a time, forward and backward."""
    monkeypatch.setattr(_matmul, "LARGEST_DENSE", 4 * 256 * 128)
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((256, 1024), jnp.float32))
    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    path = quant.explain(x, q)
    assert (path.name, path.dense_bytes) == ("slabs", 4 * 256 * 128)
    gradient = jax.jit(jax.grad(lambda x, q: jnp.sum(jnp.sin(quantized_matmul(x, q)))))
    memory = gradient.lower(x, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * path.dense_bytes + 16 * 4 * 1024


def test_the_path_is_told():
    q = quantize(normal(64, 1024))
    x = normal(2, 4, 64)
    assert quant.explain(x, q, backend="cpu").name == "dense"
    assert quant.explain(x, q, backend="gpu").dense_bytes == 4 * 64 * 1024
    assert quant.explain(x, q, backend="tpu").name == "split"
    many = jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16)
    assert quant.explain(many, q, backend="tpu").name == "dense"
    assert str(quant.explain(x, q)).startswith("dense: one dense kernel in front of one product")


def test_paths_that_are_not_there_are_refused():
    q, x = quantize(normal(64, 8)), normal(3, 64)
    with pytest.raises(InputError, match=r"no path 'splitt' \(did you mean 'split'\?\)"):
        quantized_matmul(x, q, path="splitt")


def test_gradient_by_finite_differences():
    q = quantize(normal(66, 5))
    product = jax.jit(lambda x: quantized_matmul(x, q))
    check_grads(product, (normal(3, 66),), order=1, modes=["rev"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_and_gradient_keep_the_dtype_of_x(dtype):
    q = quantize(normal(64, 8))
    x = normal(3, 64, dtype=dtype)
    y, pull = jax.vjp(lambda x: quantized_matmul(x, q), x)
    assert y.dtype == pull(y)[0].dtype == dtype
    np.testing.assert_allclose(y, x @ dense(q, dtype), rtol=2e-2, atol=2e-2)


def test_vmap_over_x_and_over_a_stack():
    stack = quantize(normal(3, 128, 6), stacked=1)
    one = jax.tree.map(lambda a: a[0], stack)
    x = normal(3, 4, 128, seed=1)
    gradient = jax.grad(lambda x, f: jnp.sum(jnp.sin(f(x))))
    shared = jax.vmap(quantized_matmul, in_axes=(0, None))
    np.testing.assert_allclose(shared(x, one), x @ dense(one), rtol=1e-4, atol=1e-4)
    each = jax.vmap(quantized_matmul)
    expected = jnp.einsum("nti,nio->nto", x, dequantize(stack))
    np.testing.assert_allclose(each(x, stack), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        gradient(x, lambda x: each(x, stack)),
        gradient(x, lambda x: x @ dequantize(stack)),
        rtol=1e-4,
        atol=1e-4,
    )


WIDTH, LAYERS = 256, 16
DENSE_LAYER = 4 * WIDTH * WIDTH


def scanned(x, stack, body):
    return jnp.sum(jax.lax.scan(body, x, stack)[0])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_one_layer_at_a_time_is_dense(format, checkpointed):
    def body(x, q):
        return jnp.tanh(quantized_matmul(x, q)), None

    body = jax.checkpoint(body) if checkpointed else body
    shape = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    stack = jax.eval_shape(lambda w: quantize(w, QuantConfig(format=format), stacked=1), shape)
    x = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, stack: scanned(x, stack, body)))
    memory = gradient.lower(x, stack).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory")
    # The recomputed product and the transposed one stand in one body: XLA:CPU takes dequantizing
    # for cheap, and fuses it into each of them.
    products = 2 if checkpointed else 1
    assert memory.temp_size_in_bytes < (products + 1) * DENSE_LAYER


def test_bad_inputs_are_refused():
    q = quantize(normal(2, 64, 8), stacked=1)
    with pytest.raises(InputError, match="must hold one kernel, got a stack"):
        quantized_matmul(normal(3, 64), q)
    with pytest.raises(InputError, match=r"must be d_in=64"):
        quantized_matmul(normal(3, 65), jax.tree.map(lambda a: a[0], q))
