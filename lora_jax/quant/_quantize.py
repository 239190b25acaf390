"""Blockwise quantization with optional zero points and double quantization of the absmax."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from .._errors import InputError
from .._quant_config import QuantConfig
from .._typing import Array
from ._codebook import GROUP, nearest_byte, nearest_nibble, pack
from ._tensor import QuantizedTensor, nested_absmax


def quantize(
    weight: Float[Array | np.ndarray, "..."],
    config: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
    *,
    stacked: int = 0,
    contracting: int | tuple[int, ...] = 1,
) -> QuantizedTensor:
    """Keep a weight in four or eight bits: one absmax per block of inputs of an output column.

        absmax = max |W[block]|,    code = nearest value of the format to W / absmax

    With a zero point the block's range, stretched to hold 0, takes the place of the absmax:
    `code = round(15·W / range) + zero`. Under double quantization the absmax values lose their
    mean and are kept as 8-bit dynamic codes with one float32 absmax for 256 of them. Codes and
    absmax of nf4 and fp4 equal bitsandbytes' where the block divides d_in; there a weight is
    `(d_out, d_in)`.

    Args:
        weight: Float array `(*stack, *kernel_shape)`.
        config: Format, block size, how absmax values are kept.
        stacked: How many leading axes stack independent kernels, such as scanned layers.
        contracting: The kernel's axes that are summed over, or how many leading ones: 1 for
            `(d_in, d_out)` and `(d, heads, head_dim)`, 2 for `(heads, head_dim, d)`, `(1,)` for
            an embedding table `(vocabulary, d)`.

    Returns:
        The quantized kernel. Nothing in it but the arrays depends on the stack axes.

    Raises:
        InputError: if the weight is not float, is empty, has too few axes, or (outside of a
            transformation) holds a value that is not finite.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (256, 256))
        >>> 8 * quantize(weight).nbytes / weight.size
        4.12744140625
        >>> 8 * quantize(weight, QuantConfig(format="int8", block_size=256)).nbytes / weight.size
        8.0322265625

    Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E; zero points: Jacob et al.
    2017, "Quantization and Training of Neural Networks", equation 1.
    """
    axes = _contracted_axes(weight, stacked, contracting)
    array = jnp.asarray(weight)
    arrays, finite = _quantize_kernels(config, stacked, axes, array)
    if not isinstance(finite, Tracer) and not finite:
        _refuse_not_finite(weight)
    return QuantizedTensor(
        *arrays,
        format=config.format,
        block_size=config.block_size,
        kernel_shape=tuple(weight.shape[stacked:]),
        contracting=axes,
        dtype=array.dtype,
    )


def config_of(q: QuantizedTensor) -> QuantConfig:
    """The config that a quantized kernel was made with."""
    return QuantConfig(
        format=q.format,  # type: ignore[arg-type]
        block_size=q.block_size,
        double_quant=q.offset is not None,
        absmax_dtype="bfloat16" if q.scales.dtype == jnp.bfloat16 else "float32",
        zero_point=q.zeros is not None,
    )


_Arrays = tuple[Array, Array, Array | None, Array | None, Array | None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _quantize_kernels(
    config: QuantConfig, stacked: int, axes: tuple[int, ...], weight: Array
) -> tuple[_Arrays, Array]:
    """The arrays of all kernels, and whether every value is finite."""
    stack, kernel_shape = weight.shape[:stacked], weight.shape[stacked:]
    features = tuple(i for i in range(len(kernel_shape)) if i not in axes)
    d_in = math.prod(kernel_shape[i] for i in axes)
    kernels = weight.reshape(-1, *kernel_shape)
    kernels = kernels.transpose(0, *(i + 1 for i in (*axes, *features)))
    matrices = kernels.reshape(len(kernels), d_in, -1)
    # In turn rather than at once, so that only one matrix has float32 copies.
    arrays = jax.lax.map(functools.partial(_quantize_matrix, config), matrices)
    # A block's absmax shows what its values are.
    _, scales, _, nested_scales, offset = arrays
    shown = (scales,) if offset is None else (nested_scales, offset)
    finite = jnp.stack([jnp.isfinite(x).all() for x in shown]).all()
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), arrays), finite


def _quantize_matrix(config: QuantConfig, matrix: Array) -> _Arrays:
    """Codes, scales, zeros, nested scales and offset of one `(d_in, d_out)` matrix."""
    d_in, d_out = matrix.shape
    # A block longer than the axis is the axis: nothing is kept for rows that are not there.
    size = min(config.block_size, d_in + d_in % 2)
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, -d_in % size), (0, 0)))
    values = padded.reshape(-1, size, d_out)
    if config.zero_point:
        lowest = jnp.minimum(values.min(axis=1), 0)
        absmax = jnp.maximum(values.max(axis=1), 0) - lowest
    else:
        lowest, absmax = None, jnp.abs(values).max(axis=1)
    # XLA:CPU's maximum drops NaN where it is vectorized, and a damaged block would look whole.
    absmax = jnp.where(jnp.isfinite(values).all(axis=1), absmax, jnp.nan)
    stored, kept = _keep(config, absmax)
    # QLoRA's codes stand for W over the exact absmax; ours, for what it will be read back as.
    qlora = config.double_quant and config.format in ("nf4", "fp4")
    divisor = absmax if qlora else stored
    codes, zeros = _encode(config, values, divisor, lowest)
    scales, nested_scales, offset = kept
    return codes, scales, zeros, nested_scales, offset


def _encode(
    config: QuantConfig, values: Array, divisor: Array, lowest: Array | None
) -> tuple[Array, Array | None]:
    """Codes of `(blocks, block, d_out)` values, and the codes of zero."""
    scaled = _normalize(values, divisor[:, None])
    if lowest is not None:
        zeros = jnp.clip(jnp.round(-15 * _normalize(lowest, divisor)), 0, 15)
        codes = jnp.clip(jnp.round(15 * scaled) + zeros[:, None], 0, 15)
        return pack(codes.astype(jnp.uint8)), zeros.astype(jnp.uint8)
    if config.format == "int8":
        return jnp.clip(jnp.round(127 * scaled), -127, 127).astype(jnp.int8), None
    return pack(nearest_nibble(scaled, config.format)), None


def _keep(
    config: QuantConfig, absmax: Array
) -> tuple[Array, tuple[Array, Array | None, Array | None]]:
    """Absmax `(blocks, d_out)` as it will be read back; the arrays that say so."""
    if not config.double_quant:
        scales = absmax.astype(config.absmax_dtype)
        return scales.astype(jnp.float32), (scales, None, None)
    codes, nested_scales, offset = _quantize_absmax(absmax)
    # Where all values are small against their mean, rounding may leave nothing, or less.
    stored = jnp.maximum(nested_absmax(codes, nested_scales, offset), 0)
    return stored, (codes, nested_scales, offset)


def _quantize_absmax(absmax: Array) -> tuple[Array, Array, Array]:
    """8-bit codes `(blocks, d_out)`, nested absmax per group, and the mean."""
    blocks, d_out = absmax.shape
    flat = absmax.T.reshape(-1)
    offset = _mean(flat)
    centred = jnp.pad(flat - offset, (0, -flat.size % GROUP)).reshape(-1, GROUP)
    nested = jnp.abs(centred).max(axis=1)
    codes = nearest_byte(_normalize(centred, nested[:, None]))
    return codes.reshape(-1)[: flat.size].reshape(d_out, blocks).T, nested, offset


def _mean(x: Array) -> Array:
    """The mean of what is not negative, by halving: the order of a plain sum, and so its rounding,
    is the compiler's choice, and a layer in a stack would differ from the same layer alone."""
    total = jnp.pad(x, (0, (1 << (x.size - 1).bit_length()) - x.size))
    while total.size > 1:
        half = total.size // 2
        total = total[:half] + total[half:]
    # It is not negative; saying so keeps what subtracts it from being fused into one rounding.
    return jnp.abs(total[0] / x.size)


def _normalize(values: Array, absmax: Array) -> Array:
    """Values over their absmax; zeros where that is zero."""
    # The reciprocal first, as bitsandbytes rounds; clamped where it would overflow.
    return values * (1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))


def _contracted_axes(
    weight: Any, stacked: int, contracting: int | tuple[int, ...]
) -> tuple[int, ...]:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise InputError(f"quantize: weight must be float, got {weight.dtype}; convert it first")
    axes = tuple(range(contracting)) if isinstance(contracting, int) else tuple(contracting)
    count = weight.ndim - stacked
    if stacked < 0 or not 0 < len(axes) < count:
        raise InputError(
            f"quantize: weight {weight.shape} needs more than stacked={stacked} +"
            f" contracting={contracting} axes, stacked >= 0 and contracting >= 1;"
            " give a vector a second axis or leave it dense"
        )
    if len(set(axes)) < len(axes) or not all(0 <= axis < count for axis in axes):
        raise InputError(
            f"quantize: contracting={contracting} must name different axes of 0..{count - 1}, those"
            f" of a kernel {weight.shape[stacked:]}"
        )
    if 0 in weight.shape:
        raise InputError(f"quantize: weight {weight.shape} is empty; leave it out")
    return axes


def _refuse_not_finite(weight: Any) -> None:
    bad = np.argwhere(~np.isfinite(np.asarray(weight, np.float32)))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise InputError(
            f"quantize: {len(bad)} of {weight.size} weights are not finite, the first at {first};"
            " a checkpoint that holds NaN or infinity is damaged: copy it again"
        )
