"""The delta: values, gradients, dropout, sixteen bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lora_jax import lora_linear, quantize
from lora_jax.lora import lora_delta
from lora_jax.quant import dequantize

SCALING = 1.7


def arrays(dtype=jnp.float32, batch=(3, 5), d_in=7, rank=2, d_out=6):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((*batch, d_in), (d_in, rank), (rank, d_out), (*batch, d_out))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def plain(x, a, b, scaling=SCALING):
    return scaling * ((x @ a) @ b)


def grads(function, x, a, b, g):
    return jax.jit(jax.grad(lambda x, a, b: jnp.sum(function(x, a, b) * g), (0, 1, 2)))(x, a, b)


def close(ours, theirs, rtol):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        one, other = np.float32(one), np.float32(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("batch", [(), (4,), (3, 5)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.03)])
def test_gradients_equal_plain_autodiff(dtype, rtol, batch):
    x, a, b, g = arrays(dtype, batch)
    ours = grads(lambda x, a, b: lora_delta(x, a, b, SCALING), x, a, b, g)
    close(ours, grads(plain, x, a, b, g), rtol)


def test_gradients_equal_finite_differences():
    x, a, b, _ = arrays()

    def delta(*arrays):  # numpy arrays, when it moves them
        return lora_delta(*map(jnp.asarray, arrays), SCALING)

    check_grads(delta, (x, a, b), order=1, modes=["rev"])


def test_gradients_under_vmap_scan_and_remat():
    x, a, b, g = arrays(batch=(3, 5))
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), (a, b))

    def vmapped(x, a, b):
        return jax.vmap(lora_delta, (0, 0, 0, None))(x, a, b, SCALING)

    def scanned(x, a, b):
        body = jax.checkpoint(lambda _, args: (None, lora_delta(*args, SCALING)))
        return jax.lax.scan(body, None, (x, a, b))[1]

    def looped(x, a, b):
        return jnp.stack([plain(*args) for args in zip(x, a, b, strict=True)])

    expected = grads(looped, x, *stacked, g)
    close(grads(vmapped, x, *stacked, g), expected, 1e-6)
    close(grads(scanned, x, *stacked, g), expected, 1e-6)


def test_scaling_has_no_gradient():
    x, a, b, _ = arrays()
    gradient = jax.grad(lambda s: lora_delta(x, a, b, s).sum())(jnp.float32(SCALING))
    assert gradient == 0 and lora_delta(x, a, b, SCALING).sum() != 0


def test_the_layer_is_the_sum_of_both_paths():
    x, a, b, _ = arrays()
    kernel = jax.random.normal(jax.random.key(9), (7, 6))
    out = lora_linear(x, kernel, a, b, SCALING)
    np.testing.assert_allclose(out, x @ (kernel + SCALING * a @ b), rtol=1e-5, atol=1e-5)
    q = quantize(kernel)
    out = lora_linear(x, q, a, b, SCALING)
    np.testing.assert_allclose(out, x @ (dequantize(q) + SCALING * a @ b), rtol=1e-5, atol=1e-5)


def test_scaling_is_not_rounded_to_sixteen_bits():
    """1/3 in bfloat16 is off by 2e-3; here a rank of one and ones make all else exact."""
    x, a, b = jnp.ones((1, 3)), jnp.ones((3, 1)), jnp.ones((1, 1))
    x, a, b = (v.astype(jnp.bfloat16) for v in (x, a, b))
    assert lora_delta(x, a, b, 1 / 3) == 1.0


def test_float16_is_scaled_before_it_overflows():
    x, a, b = jnp.full((1, 64), 100.0), jnp.full((64, 1), 100.0), jnp.ones((1, 2))
    x, a, b = (v.astype(jnp.float16) for v in (x, a, b))  # x·A is 640,000; float16 ends at 65,504
    out = lora_delta(x, a, b, 1 / 64)
    np.testing.assert_allclose(np.float32(out), 10_000.0, rtol=1e-3)
    gradient = jax.grad(lambda b: lora_delta(x, a, b, 1 / 64).astype(jnp.float32).sum())(b)
    assert np.isfinite(np.float32(gradient)).all()


def test_no_key_no_dropout():
    x, a, b, _ = arrays()
    kernel = jnp.zeros((7, 6))
    dropped = lora_linear(x, kernel, a, b, SCALING, dropout_rate=0.9)
    np.testing.assert_array_equal(dropped, lora_linear(x, kernel, a, b, SCALING))


def test_dropout_keeps_the_mean_and_the_base():
    x, a, b, _ = arrays(batch=(2,))
    kernel = jax.random.normal(jax.random.key(9), (7, 6))

    def out(key, b=b):
        return lora_linear(x, kernel, a, b, SCALING, dropout_key=key, dropout_rate=0.25)

    key = jax.random.key(3)
    np.testing.assert_array_equal(out(key), out(key))
    assert not np.array_equal(out(key), out(jax.random.key(4)))
    np.testing.assert_array_equal(out(key, b=jnp.zeros_like(b)), x @ kernel)
    samples = jax.vmap(out)(jax.random.split(key, 4000))
    expected = lora_linear(x, kernel, a, b, SCALING)
    error = samples.std(0) / np.sqrt(4000)
    assert (jnp.abs(samples.mean(0) - expected) < 5 * error).all()


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((400, 1))
    one = jnp.ones((1, 1))
    out = lora_linear(
        x, jnp.zeros((1, 1)), one, one, 1.0, dropout_key=jax.random.key(0), dropout_rate=0.2
    )
    values, counts = np.unique(np.asarray(out), return_counts=True)
    np.testing.assert_allclose(values, [0, 1.25])
    assert 40 < counts[0] < 120
