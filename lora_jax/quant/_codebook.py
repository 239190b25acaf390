"""Codebooks, nibble packing, and the 8-bit map that double quantization uses."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import Array

# Quantiles of N(0, 1) scaled to [-1, 1], zero among them (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign bit over the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4: bitsandbytes' order.
_MAGNITUDES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
# -8..7 over 7.5: both ends of [-1, 1] are half a step from their nearest value.
INT4 = tuple((index - 8) / 7.5 for index in range(16))
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}
ZERO_CODE = 127
GROUP = 256  # absmax values under one nested absmax


def midpoints(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Boundaries between neighbouring values, rounded as float32 arithmetic rounds them."""
    exact = np.asarray(values, np.float32)
    return (exact[:-1] + exact[1:]) / np.float32(2)


def nearest_nibble(x: Array, format: str) -> Array:
    """Index of the nearest value of a codebook; that of the lower value on a tie."""
    values = sorted(set(CODEBOOKS[format]))
    # A sum of comparisons stays one elementwise loop, where a search becomes a gather per step.
    rank: Array = sum((x > bound).astype(jnp.uint8) for bound in midpoints(values))  # type: ignore
    if CODEBOOKS[format] == tuple(values):
        return rank
    return jnp.asarray([CODEBOOKS[format].index(value) for value in values], jnp.uint8)[rank]


def pack(nibbles: Array) -> Array:
    """Bytes `(..., b/2, n)` of nibbles `(..., b, n)`; a byte's high one is of the first half."""
    first, second = jnp.split(nibbles, 2, axis=-2)
    return (first << 4) | second


def unpack(codes: Array) -> tuple[Array, Array]:
    """The two nibbles of each byte, those of the block's first half first."""
    return codes >> 4, codes & 15


# Traced once for each shape, however many layers read it.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def lookup(index: Array, format: str) -> Array:
    """The float32 value at each index of 0..15."""
    if format == "int4":
        return (index.astype(jnp.int32).astype(jnp.float32) - 8) / 7.5
    # On CPUs a gather takes less than half the time; elsewhere selects fuse with what uses them,
    # and gathers do not.
    values = CODEBOOKS[format]
    return jax.lax.platform_dependent(
        index,
        cpu=functools.partial(_gather, values=values),
        default=functools.partial(_select, values=values),
    )


def _gather(index: Array, values: Sequence[float]) -> Array:
    return jnp.asarray(values, jnp.float32)[index.astype(jnp.int32)]


def _select(index: Array, values: Sequence[float]) -> Array:
    """A tree of 15 selects, one level for each bit."""
    zero = _zero_read_off(index[(0,) * index.ndim])
    level: list[Array] = [jnp.float32(value) + zero for value in values]
    for bit in range(4):
        is_set = (index & (1 << bit)) != 0
        level = [
            jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def _zero_read_off(integer: Array) -> Array:
    """A float32 zero for each integer, which XLA folds and JAX takes for data.

    When a scan is differentiated, JAX computes what depends on constants alone before it, and keeps
    it for all layers: 9 GB of spread codebook values for an 8B model.
    """
    return (integer & 0).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="signed", inline=True)
def dynamic_values(codes: Array, *, signed: bool = True) -> Array:
    """Float32 values of the dynamic 8-bit type, ascending in its 256 codes.

    A position p = 2^k + j, 0 <= j < 2^k, is the centre of the j-th of 2^k equal parts of a decade
    (Dettmers 2016, "8-bit approximations for parallelism in deep learning").  Signed: codes
    127 ± p with k = 0..6 cut `10^(k-6)·[0.1, 1]`, 127 is 0.  Unsigned: codes p - 1 with
    k = 1..7 cut `10^(k-7)·[0.1, 1]`, 0 is 0.  Both end at 255, which is 1.
    """
    # On CPUs the arithmetic takes longer than all the rest of dequantizing; elsewhere it fuses, and
    # gathers do not.
    return jax.lax.platform_dependent(
        codes,
        cpu=functools.partial(_gather_dynamic, signed=signed),
        default=functools.partial(_compute_dynamic, signed=signed),
    )


def _gather_dynamic(codes: Array, signed: bool) -> Array:
    return jnp.asarray(dynamic_table(signed))[codes.astype(jnp.int32)]


@functools.cache
def dynamic_table(signed: bool) -> np.ndarray:
    """The values of all 256 codes."""
    with jax.ensure_compile_time_eval():
        return np.asarray(_compute_dynamic(jnp.arange(256, dtype=jnp.uint8), signed))


def _compute_dynamic(codes: Array, signed: bool) -> Array:
    decades = _decades(signed)
    position = codes.astype(jnp.int32) - (ZERO_CODE if signed else -1)
    part = jnp.abs(position).astype(jnp.float32)
    value = zero = _zero_read_off(position)
    for k in decades:
        centre = 0.1 + 0.9 * ((part + 0.5) * 2.0**-k - 1)
        value = jnp.where(part >= 2**k, 10.0 ** (k - decades[-1]) * centre, value)
    value = jnp.where(part == 2 ** (decades[-1] + 1), zero + 1, value)
    return jnp.where(position < 0, -value, value)


def nearest_byte(x: Array, *, signed: bool = True) -> Array:
    """Code of the nearest dynamic value; the lower one on a tie."""
    bounds = midpoints(dynamic_table(signed))
    # The part of its decade that a number is in has its nearest value or that value's neighbour.
    # Unlike a binary search, this stays one elementwise loop without temporary arrays.
    guess = _part_of_decade(jnp.abs(x), _decades(signed))
    guess = jnp.where(x < 0, ZERO_CODE - guess, ZERO_CODE + guess) if signed else guess - 1
    up = x > jnp.asarray(bounds)[guess]
    down = x <= jnp.asarray(np.append(np.float32(-np.inf), bounds))[guess]
    return (guess + up - down).astype(jnp.uint8)


def _decades(signed: bool) -> range:
    """Decades of 2^k parts each."""
    return range(7) if signed else range(1, 8)


def _part_of_decade(size: Array, decades: range) -> Array:
    """Position 2^k + j of the part that holds a number of [0, 1], rounding aside."""
    first, last = decades[0], decades[-1]
    count = jnp.full_like(size, 2.0**first)
    per_part = jnp.full_like(size, 2.0**first * 10.0 ** (last - first) / 0.9)
    for k in decades[1:]:
        above = size > 10.0 ** (k - last - 1)
        count = jnp.where(above, 2.0**k, count)
        per_part = jnp.where(above, 2.0**k * 10.0 ** (last - k) / 0.9, per_part)
    part = jnp.floor(size * per_part - count / 9)
    return (count + jnp.clip(part, 0, count - 1)).astype(jnp.int32)
