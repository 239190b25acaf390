"""Codebooks, nibbles and the dynamic 8-bit map."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.quant import _codebook as codebook

nibbles = st.lists(st.integers(0, 15), min_size=4, max_size=4)


@settings(max_examples=20)
@given(nibbles, nibbles)
def test_unpack_inverts_pack(first, second):
    block = np.array([first, second], np.uint8).reshape(4, 2)
    codes = codebook.pack(jnp.asarray(block))
    assert codes.shape == (2, 2)
    np.testing.assert_array_equal(np.concatenate(codebook.unpack(codes)), block)


@pytest.mark.parametrize("format", codebook.CODEBOOKS)
def test_lookup_is_the_codebook(format):
    values = codebook.lookup(jnp.arange(16, dtype=jnp.uint8), format)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, codebook.CODEBOOKS[format], rtol=1e-7)
    assert 0 in values


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_gather_and_selects_agree(format):
    index, values = jnp.arange(16, dtype=jnp.uint8), codebook.CODEBOOKS[format]
    np.testing.assert_array_equal(codebook._gather(index, values), codebook._select(index, values))


@pytest.mark.parametrize("format", codebook.CODEBOOKS)
@settings(max_examples=20)
@given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=4, max_size=4))
def test_nearest_nibble_is_nearest(format, numbers):
    values = np.float32(codebook.CODEBOOKS[format])
    x = np.float32(numbers)
    index = np.asarray(codebook.nearest_nibble(jnp.asarray(x), format))
    distances = np.abs(x[:, None] - values)
    np.testing.assert_allclose(
        np.abs(x - values[index]), distances.min(axis=1), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("format", codebook.CODEBOOKS)
def test_ties_go_down(format):
    values = np.float32(sorted(set(codebook.CODEBOOKS[format])))
    index = codebook.nearest_nibble(jnp.asarray(codebook.midpoints(values)), format)
    np.testing.assert_allclose(codebook.lookup(index, format), values[:-1], rtol=1e-7)


def test_dynamic_values_ascend_and_are_their_own_nearest():
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = codebook.dynamic_values(codes)
    assert np.all(np.diff(values) > 0)
    np.testing.assert_array_equal(codebook.nearest_byte(values), codes)
    assert values[codebook.ZERO_CODE] == 0
    assert values[255] == 1
    np.testing.assert_array_equal(values[:127], -values[128:255][::-1])
