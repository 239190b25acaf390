"""A number for each array, by which one that came back from a disk is known to be the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._typing import Array
from ..optim._offload import to_device


def fingerprints(tree: Any) -> list[int]:
    """A number below 2^32 for every leaf: the sum over its words of `mix(word + position · odd)`.

    `mix` is a bijection of 32-bit words, so that a change of any single word, be it of one bit,
    always changes the sum; any other change escapes with a chance of 2^-32.  Sums modulo 2^32 have
    no order: however an array is cut over devices, its number is the same.

    Args:
        tree: Arrays of any type but complex, typed keys too.

    Example:
        >>> one, other, swapped = fingerprints([jnp.arange(3), jnp.arange(3), jnp.array([1, 0, 2])])
        >>> one == other, one == swapped
        (True, False)
    """
    return [int(x) for x in jax.device_get([_fingerprint(leaf) for leaf in jax.tree.leaves(tree)])]


# A leaf at a time: one program for all would hold them in one place, and be compiled for each tree.
@jax.jit
def _fingerprint(leaf: Any) -> Array:
    words = _words(to_device(leaf))
    # Wraps where there are more than 2^32.
    position = functools.reduce(
        lambda rest, axis: rest * words.shape[axis] + _iota(words.shape, axis),
        range(words.ndim),
        jnp.zeros(words.shape, jnp.uint32),
    )
    return jnp.sum(_mix(words + position * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _words(leaf: Any) -> Array:
    """The bits of every entry, as 32-bit words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    width = min(leaf.dtype.itemsize, 4) * 8
    # An entry of 64 bits becomes two words along a new last axis.
    return jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby): each shift and odd factor is invertible."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
