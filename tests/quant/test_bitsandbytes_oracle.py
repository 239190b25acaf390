"""Codes, absmax and dequantized weights against bitsandbytes on the CPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

from lora_jax import _quant_config  # noqa: E402
from lora_jax.quant import _codebook, dequantize, quantize  # noqa: E402

pytestmark = pytest.mark.oracle

SHAPES = [(64, 3), (128, 256), (192, 40), (320, 77)]
PLAIN = _quant_config.QuantConfig(double_quant=False)
FP4 = _quant_config.QuantConfig(format="fp4", double_quant=False)


def weight(shape, dtype="float32", seed=0):
    """A torch weight (d_out, d_in) and the same as a kernel (d_in, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape[1], shape[0], generator=generator).to(getattr(torch, dtype))
    return tensor, jnp.asarray(tensor.float().numpy().T, dtype)


def theirs(tensor, double_quant, quant_type="nf4", blocksize=64):
    return functional.quantize_4bit(
        tensor, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )


def in_their_order(per_block):
    """(blocks, d_out) to bitsandbytes' flat (d_out, blocks)."""
    return np.asarray(per_block).T.reshape(-1)


def in_our_order(flat, q):
    """The inverse."""
    return jnp.asarray(np.asarray(flat).reshape(q.d_out, -1).T)


def nibbles(packed):
    """Their codes, one by one."""
    their_bytes = packed.numpy().reshape(-1)
    return np.stack([their_bytes >> 4, their_bytes & 15], axis=1).reshape(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [PLAIN, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_absmax_are_equal(shape, config, dtype):
    tensor, kernel = weight(shape, dtype)
    packed, state = theirs(tensor, double_quant=False, quant_type=config.format)
    q = quantize(kernel, config)

    codes = np.stack(_codebook.unpack(q.codes), axis=1).reshape(-1, shape[1]).T.reshape(-1)
    if config.format == "nf4":
        np.testing.assert_array_equal(codes, nibbles(packed))
    else:  # Two of their codes stand for zero.
        np.testing.assert_array_equal(codes % 8 * (codes != 8), nibbles(packed) % 8)
    np.testing.assert_array_equal(in_their_order(q.scales), state.absmax.numpy())
    np.testing.assert_array_equal(
        np.float32(dequantize(q).T), functional.dequantize_4bit(packed, state).float().numpy()
    )


def test_dynamic_map_is_equal_to_rounding():
    ours = _codebook.dynamic_values(jnp.arange(256, dtype=jnp.uint8))
    np.testing.assert_allclose(ours, functional.create_dynamic_map().numpy(), rtol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization(shape):
    tensor, kernel = weight(shape)
    _, plain = theirs(tensor, double_quant=False)
    _, state = theirs(tensor, double_quant=True)
    q = quantize(kernel)
    np.testing.assert_allclose(q.offset, state.offset.numpy(), rtol=5e-7)
    np.testing.assert_allclose(q.nested_scales, state.state2.absmax.numpy(), atol=1e-6)

    # Their CPU code finds a value through a table of rounded inputs, so that about one in a
    # thousand close to a boundary gets the farther neighbour; ours must then be the nearer one.
    ours, their = in_their_order(q.scales), state.absmax.numpy()
    differ = np.flatnonzero(ours != their)
    assert len(differ) <= 1 + len(ours) // 200
    values = functional.create_dynamic_map().numpy()
    nested = state.state2.absmax.numpy()[differ // 256]
    exact = (plain.absmax.numpy() - state.offset.numpy())[differ] / nested
    assert np.all(np.abs(exact - values[ours[differ]]) <= np.abs(exact - values[their[differ]]))
    np.testing.assert_array_equal(np.abs(ours[differ].astype(int) - their[differ]), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_their_double_quantized_weight_reads_the_same(shape):
    tensor, kernel = weight(shape)
    packed, state = theirs(tensor, double_quant=True)
    q = dataclasses.replace(quantize(kernel), offset=jnp.asarray(state.offset.numpy()))
    q = dataclasses.replace(
        q,
        scales=in_our_order(state.absmax.numpy(), q),
        nested_scales=jnp.asarray(state.state2.absmax.numpy()),
    )
    expected = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(dequantize(q).T, expected, rtol=1e-6, atol=1e-6)


def test_double_quantized_weight_equals_theirs_where_the_codes_agree():
    shape = (192, 40)
    tensor, kernel = weight(shape)
    packed, state = theirs(tensor, double_quant=True)
    q = quantize(kernel)
    agree = in_their_order(q.scales) == state.absmax.numpy()
    assert agree.mean() > 0.98
    ours = np.asarray(dequantize(q)).T.reshape(-1, 64)[agree]
    expected = functional.dequantize_4bit(packed, state).numpy().reshape(-1, 64)[agree]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("double_quant", "golden"), [(False, 0.092125), (True, 0.092147)])
def test_golden_error(double_quant, golden):
    torch.manual_seed(0)
    kernel = jnp.asarray(torch.randn(512, 512).numpy().T)
    q = quantize(kernel, _quant_config.QuantConfig(double_quant=double_quant))
    rms = float(jnp.sqrt(jnp.mean((dequantize(q) - kernel) ** 2)))
    assert rms == pytest.approx(golden, abs=6e-7)


@pytest.mark.parametrize("blocksize", [32, 128, 512, 1024])
def test_other_block_sizes(blocksize):
    tensor, kernel = weight((1024, 12), seed=1)
    packed, state = theirs(tensor, double_quant=False, blocksize=blocksize)
    q = quantize(kernel, _quant_config.QuantConfig(block_size=blocksize, double_quant=False))
    np.testing.assert_array_equal(in_their_order(q.scales), state.absmax.numpy())
    expected = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(dequantize(q).T, expected)
