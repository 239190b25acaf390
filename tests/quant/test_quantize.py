"""`quantize`: error bounds, padding, stacks, dtypes, edge cases, refusals."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax._config import QuantConfig
from lora_jax._errors import InputError
from lora_jax.quant import _tensor, dequantize, quantize

CONFIGS = [QuantConfig(format=f, double_quant=d) for f in ("nf4", "int4") for d in (False, True)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(70, 3), (192, 2)]), st.integers(0, 99), st.sampled_from([1e-30, 1, 1e30]))
def test_int4_error_is_at_most_half_a_step(shape, seed, size):
    (d_in, d_out), kernel = shape, normal(*shape, seed=seed) * size
    q = quantize(kernel, QuantConfig(format="int4", double_quant=False))
    absmax = np.repeat(np.asarray(q.scales).reshape(-1, d_out), 64, axis=0)[:d_in]
    error = np.abs(np.asarray(dequantize(q)) - np.asarray(kernel))
    assert np.all(error <= absmax / 15 * (1 + 1e-5))


@every_config
@pytest.mark.parametrize("d_in", [1, 63, 64, 65, 130])
def test_odd_sizes(config, d_in):
    kernel = normal(d_in, 3)
    q = quantize(kernel, config)
    assert q.shape == kernel.shape
    assert q.codes.shape == (-(-d_in // 128), 64, 3)
    dense = np.asarray(dequantize(q))
    assert np.all(np.isfinite(dense))
    # Half of the widest gap between neighbouring values, with room for 8-bit absmax.
    assert np.abs(dense - kernel).max() <= 0.2 * np.abs(kernel).max()
    # Rows do not feel the padding: a longer kernel with zero rows reads the same.
    padded = quantize(jnp.pad(kernel, ((0, -d_in % 64), (0, 0))), config)
    np.testing.assert_allclose(dequantize(padded)[:d_in], dense, rtol=1e-6, atol=1e-6)


@every_config
def test_blocks_of_zeros_are_zeros(config):
    kernel = normal(256, 4).at[64:192].set(0).at[:, 1].set(0)
    dense = np.asarray(dequantize(quantize(kernel, config)))
    assert np.all(np.isfinite(dense))
    np.testing.assert_array_equal(dense[np.asarray(kernel) == 0], 0)
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((65, 3)), config)), 0)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e38])
def test_extreme_sizes_stay_finite(size):
    kernel = np.linspace(-1, 1, 128, dtype=np.float32)[:, None] * np.float32(size)
    assert np.all(np.isfinite(dequantize(quantize(kernel))))


def test_a_nan_is_not_hidden():
    dense = dequantize(quantize(normal(128, 2).at[3, 1].set(jnp.nan), QuantConfig()))
    assert np.isnan(dense[3, 1])


@every_config
def test_stack_equals_each_alone(config):
    kernels = normal(2, 3, 192, 10)
    stacked = quantize(kernels, config, stacked=2)
    assert stacked.shape == kernels.shape
    for index in np.ndindex(2, 3):
        one = jax.tree.map(operator.itemgetter(index), stacked)
        jax.tree.map(np.testing.assert_array_equal, one, quantize(kernels[index], config))


@pytest.mark.parametrize(("shape", "contracting"), [((96, 4, 8), 1), ((4, 24, 16), 2)])
def test_more_axes_are_flattened(shape, contracting):
    kernel = normal(*shape)
    d_in = int(np.prod(shape[:contracting]))
    q, flat = quantize(kernel, contracting=contracting), quantize(kernel.reshape(d_in, -1))
    assert q.shape == shape and (q.d_in, q.d_out) == flat.shape
    np.testing.assert_array_equal(q.codes, flat.codes)
    np.testing.assert_array_equal(dequantize(q), dequantize(flat).reshape(shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    kernel = normal(130, 6, dtype=dtype)
    q, exact = quantize(kernel), quantize(kernel.astype(jnp.float32))
    np.testing.assert_array_equal(q.codes, exact.codes)
    assert dequantize(q).dtype == dtype
    np.testing.assert_array_equal(dequantize(q), dequantize(exact).astype(dtype))
    np.testing.assert_array_equal(dequantize(q, jnp.float32), dequantize(exact))


def test_numpy_and_jit_agree():
    kernel = np.asarray(normal(130, 6))
    expected = quantize(kernel)
    jitted = jax.jit(quantize)(kernel)
    np.testing.assert_array_equal(jitted.codes, expected.codes)
    np.testing.assert_allclose(_tensor.absmax(jitted), _tensor.absmax(expected), rtol=1e-6)


def test_bits_per_parameter():
    weight = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    bits = {
        double: 8
        * jax.eval_shape(
            lambda w, d=double: quantize(w, QuantConfig(double_quant=d)), weight
        ).nbytes
        for double in (False, True)
    }
    assert bits[False] / 4096**2 == 4.5
    assert bits[True] / 4096**2 == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(
    ("weight", "options", "rule"),
    [
        (np.ones((4, 4), np.int32), {}, "must be float, got int32"),
        (np.ones(4, np.float32), {}, "needs more than stacked=0"),
        (np.ones((4, 4), np.float32), {"stacked": 1}, "needs more than stacked=1"),
        (np.ones((4, 4), np.float32), {"contracting": 0}, "contracting >= 1"),
        (np.ones((4, 4), np.float32), {"stacked": -1}, "stacked >= 0"),
        (np.ones((0, 4), np.float32), {}, "is empty"),
    ],
)
def test_bad_weights_are_refused(weight, options, rule):
    with pytest.raises(InputError, match=rule) as caught:
        # As a plain call: what is refused here must not depend on annotations being checked.
        getattr(quantize, "__wrapped__", quantize)(weight, **options)
    assert "\n" not in str(caught.value)


def test_dequantize_to_integers_is_refused():
    with pytest.raises(InputError, match="must be a float type, got int8"):
        dequantize(quantize(normal(4, 4)), jnp.int8)
