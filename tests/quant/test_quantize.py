"""`quantize`: error bounds, padding, stacks, dtypes, edge cases, refusals."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax._errors import InputError
from lora_jax._quant_config import QuantConfig
from lora_jax.quant import _tensor, dequantize, quantize

FORMATS = [("nf4", False), ("fp4", False), ("int4", False), ("int4", True), ("int8", False)]
CONFIGS = [
    QuantConfig(format=f, zero_point=z, double_quant=d) for f, z in FORMATS for d in (False, True)
]
BFLOAT16 = QuantConfig(double_quant=False, absmax_dtype="bfloat16")


def name(config):
    zero = "-zero" if config.zero_point else ""
    kept = "-double" if config.double_quant else f"-{config.absmax_dtype}"
    return f"{config.format}{zero}{kept}"


every_config = pytest.mark.parametrize("config", [*CONFIGS, BFLOAT16], ids=name)
# How absmax values are kept has little to do with the shape.
every_format = pytest.mark.parametrize("config", [*CONFIGS[::2], CONFIGS[1]], ids=name)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def absmax_of_rows(q):
    """Each row's absmax (d_in, d_out)."""
    rows = q.codes.shape[-2] * (1 if q.format == "int8" else 2)
    return np.repeat(np.asarray(_tensor.absmax(q)), rows, axis=0)[: q.d_in]


@pytest.mark.parametrize(
    ("format", "zero_point", "steps"),
    [("int4", False, 7.5), ("int4", True, 15), ("int8", False, 127)],
)
@settings(max_examples=20)
@given(st.sampled_from([(70, 3), (192, 2)]), st.integers(0, 99), st.sampled_from([1e-30, 1, 1e30]))
def test_integers_are_at_most_half_a_step_off(format, zero_point, steps, shape, seed, size):
    kernel = (normal(*shape, seed=seed) + zero_point) * size
    q = quantize(kernel, QuantConfig(format=format, double_quant=False, zero_point=zero_point))
    error = np.abs(np.asarray(dequantize(q)) - np.asarray(kernel))
    # The zero point is rounded too, which may move the range's ends out by half a step.
    allowed = 0.5 + 0.5 * zero_point
    assert np.all(error <= allowed * absmax_of_rows(q) / steps * (1 + 1e-5))


@every_format
@pytest.mark.parametrize("block", [32, 34, 128, 4096])
def test_any_block(config, block):
    """One absmax for each block, and none for rows that are not there."""
    kernel = normal(300, 5) * jnp.linspace(1, 9, 300)[:, None]
    q = quantize(kernel, dataclasses.replace(config, block_size=block))
    blocks = -(-300 // block)
    rows = min(block, 300)
    assert q.scales.shape == (blocks, 5)
    assert q.codes.shape == (blocks, rows if config.format == "int8" else rows // 2, 5)
    error = np.abs(np.asarray(dequantize(q)) - np.asarray(kernel))
    # Half of FP4's widest gap between neighbouring values, with room for 8-bit absmax.
    exact = np.abs(np.pad(kernel, ((0, -300 % rows), (0, 0)))).reshape(blocks, rows, 5).max(axis=1)
    assert np.all(error <= 0.2 * np.repeat(exact, rows, axis=0)[:300])


def test_zero_points_follow_a_block_on_one_side():
    kernel = jnp.abs(normal(256, 8)) + 0.5
    errors = {
        zero: float(
            jnp.abs(
                dequantize(quantize(kernel, QuantConfig("int4", zero_point=zero))) - kernel
            ).mean()
        )
        for zero in (False, True)
    }
    assert errors[True] < 0.6 * errors[False]
    q = quantize(kernel, QuantConfig("int4", zero_point=True))
    np.testing.assert_array_equal(q.zeros, 0)


@pytest.mark.parametrize("contracting", [(1,), (0, 2), (2, 0)])
def test_any_axes_are_contracted(contracting):
    kernel = normal(6, 10, 22)
    others = [i for i in range(3) if i not in contracting]
    d_in = int(np.prod([kernel.shape[i] for i in contracting]))
    matrix = kernel.transpose(*contracting, *others).reshape(d_in, -1)
    q = quantize(kernel, contracting=contracting)
    assert (q.shape, q.d_in, q.d_out) == (kernel.shape, *matrix.shape)
    again = dequantize(q).transpose(*contracting, *others).reshape(d_in, -1)
    np.testing.assert_array_equal(again, dequantize(quantize(matrix)))


@every_format
@pytest.mark.parametrize("d_in", [1, 63, 64, 65, 130])
def test_odd_sizes(config, d_in):
    kernel = normal(d_in, 3)
    q = quantize(kernel, config)
    assert q.shape == kernel.shape
    rows = min(64, d_in + d_in % 2)
    assert q.codes.shape == (-(-d_in // 64), rows if config.format == "int8" else rows // 2, 3)
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


@every_config
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_refused_or_seen(config, value):
    # So many columns that XLA's loops over them are vectorized, which treats NaN otherwise.
    kernel = normal(2, 128, 64).at[1, 3, 1].set(value)
    with pytest.raises(
        InputError, match=r"1 of 16384 weights are not finite, the first at \(1, 3, 1\)"
    ):
        quantize(kernel, config, stacked=1)
    # Inside a transformation nothing can be raised, and nothing is hidden.
    dense = jax.jit(lambda x: dequantize(quantize(x, config, stacked=1)))(kernel)
    assert not np.isfinite(dense[1, 3, 1])


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
        (np.ones((4, 4), np.float32), {"contracting": (2,)}, r"different axes of 0\.\.1"),
        (np.ones((4, 4, 4), np.float32), {"contracting": (1, 1)}, r"different axes of 0\.\.2"),
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
