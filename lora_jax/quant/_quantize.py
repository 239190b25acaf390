"""Blockwise 4-bit quantization with optional double quantization of the absmax values."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._config import QuantConfig
from .._errors import InputError
from .._typing import Array
from ._codebook import CODEBOOKS, ZERO_CODE, nearest_byte, nearest_nibble, pack
from ._tensor import GROUP, QuantizedTensor


def quantize(
    weight: Float[Array | np.ndarray, "..."],
    config: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
    *,
    stacked: int = 0,
    contracting: int = 1,
) -> QuantizedTensor:
    """Keep a weight in four bits: one absmax per 64 inputs of each output column.

        absmax = max |W[block]|,    index = nearest of codebook to W / absmax

    Under double quantization the absmax values lose their mean and are kept as 8-bit dynamic
    codes with one float32 absmax for 256 of them. Codes and absmax equal bitsandbytes' where
    d_in is a multiple of 64; there a weight is `(d_out, d_in)`.

    Args:
        weight: Float array `(*stack, *kernel_shape)`.
        config: Format, block size, double quantization.
        stacked: How many leading axes stack independent kernels, such as scanned layers.
        contracting: How many of the kernel's leading axes are summed over: 1 for
            `(d_in, d_out)` and `(d, heads, head_dim)`, 2 for `(heads, head_dim, d)`.

    Returns:
        The quantized kernel. Nothing in it but the arrays depends on the stack axes.

    Raises:
        InputError: if the weight is not float, is empty, or has too few axes.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (256, 256))
        >>> 8 * quantize(weight).nbytes / weight.size
        4.12744140625

    Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E.
    """
    _check(weight, stacked, contracting)
    stack, kernel_shape = weight.shape[:stacked], weight.shape[stacked:]
    d_in = math.prod(kernel_shape[:contracting])
    matrices = jnp.asarray(weight).reshape(-1, d_in, math.prod(kernel_shape[contracting:]))
    arrays = _quantize_matrices(config, matrices)
    arrays = jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), arrays)
    return QuantizedTensor(
        *arrays,
        format=config.format,
        block_size=config.block_size,
        kernel_shape=tuple(kernel_shape),
        contracting=contracting,
        dtype=matrices.dtype,
    )


def config_of(q: QuantizedTensor) -> QuantConfig:
    """The config that a quantized kernel was made with."""
    return QuantConfig(q.format, q.block_size, q.offset is not None)  # type: ignore[arg-type]


_Arrays = tuple[Array, Array, Array | None, Array | None]


@functools.partial(jax.jit, static_argnums=0)
def _quantize_matrices(config: QuantConfig, matrices: Array) -> _Arrays:
    # In turn rather than at once, so that only one matrix has float32 copies.
    return jax.lax.map(functools.partial(_quantize_matrix, config), matrices)


def _quantize_matrix(config: QuantConfig, matrix: Array) -> _Arrays:
    """Codes, scales, nested scales and offset of one `(d_in, d_out)` matrix."""
    size = config.block_size
    d_in, d_out = matrix.shape
    blocks = -(-d_in // size)
    pairs = -(-blocks // 2)
    padding = ((0, 2 * pairs * size - d_in), (0, 0))
    values = jnp.pad(matrix.astype(jnp.float32), padding).reshape(pairs, 2, size, d_out)
    absmax = jnp.abs(values).max(axis=2)
    index = nearest_nibble(_normalize(values, absmax[:, :, None]), CODEBOOKS[config.format])
    codes = pack(index[:, 0], index[:, 1])
    if not config.double_quant:
        return codes, absmax, None, None
    return codes, *_quantize_absmax(absmax, blocks)


def _quantize_absmax(absmax: Array, blocks: int) -> tuple[Array, Array, Array]:
    """8-bit codes `(pairs, 2, d_out)`, nested absmax per group, and the mean.

    Only real blocks count: a block of padding alone is in neither the mean nor a group.
    """
    pairs, _, d_out = absmax.shape
    real = absmax.reshape(2 * pairs, d_out)[:blocks].T.reshape(-1)
    offset = _mean(real)
    centred = jnp.pad(real - offset, (0, -real.size % GROUP)).reshape(-1, GROUP)
    nested = jnp.abs(centred).max(axis=1)
    codes = nearest_byte(_normalize(centred, nested[:, None]))
    by_block = codes.reshape(-1)[: real.size].reshape(d_out, blocks).T
    padding = ((0, 2 * pairs - blocks), (0, 0))
    padded = jnp.pad(by_block, padding, constant_values=ZERO_CODE)
    return padded.reshape(absmax.shape), nested, offset


def _mean(x: Array) -> Array:
    """The mean of what is not negative, by halving: the order of a plain sum, and so its rounding,
    is the compiler's choice, and a layer in a stack would differ from the same layer alone."""
    total = jnp.pad(x, (0, (1 << (x.size - 1).bit_length()) - x.size))
    while total.size > 1:
        half = total.size // 2
        total = total[:half] + total[half:]
    # It is not negative; saying so keeps what subtracts it from being fused into one rounding.
    return jnp.maximum(total[0] / x.size, 0.0)


def _normalize(values: Array, absmax: Array) -> Array:
    """Values over their absmax; zeros where that is zero."""
    # The reciprocal first, as bitsandbytes rounds; clamped where it would overflow.
    return values * (1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))


def _check(weight: Any, stacked: int, contracting: int) -> None:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise InputError(f"quantize: weight must be float, got {weight.dtype}; convert it first")
    if stacked < 0 or contracting < 1 or weight.ndim <= stacked + contracting:
        raise InputError(
            f"quantize: weight {weight.shape} needs more than stacked={stacked} +"
            f" contracting={contracting} axes, stacked >= 0 and contracting >= 1;"
            " give a vector a second axis or leave it dense"
        )
    if 0 in weight.shape:
        raise InputError(f"quantize: weight {weight.shape} is empty; leave it out")
