"""How far a quantized weight is from the one it came from."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from .._quant_config import QuantConfig
from .._typing import Array
from ._quantize import quantize
from ._tensor import dequantize


class QuantizationError(NamedTuple):
    """Errors of a weight, or of every weight of a stack; all are shares, without a unit.

    `rms` is the root of the mean squared error over that of the mean squared weight, `worst` the
    same for the block where it is largest, `outliers` the share of weights beyond six times the
    root mean square of their matrix.
    """

    rms: Float[Array, "*stack"]
    worst: Float[Array, "*stack"]
    outliers: Float[Array, "*stack"]


def quantization_error(
    weight: Float[Array, "*stack d_in d_out"], config: QuantConfig
) -> QuantizationError:
    """Error of quantizing a kernel `(d_in, d_out)`, or a stack of them.

        rms = ‖W - dequantize(quantize(W))‖ / ‖W‖

    Args:
        weight: The dense weight.
        config: How to quantize it.

    Returns:
        Float32 errors, one of each kind for every kernel of the stack.

    Example:
        >>> import jax
        >>> weight = jax.random.normal(jax.random.key(0), (256, 64))
        >>> error = quantization_error(weight, QuantConfig(format="int8"))
        >>> round(float(error.rms), 4), float(error.outliers)
        (0.0059, 0.0)
    """
    stacked = weight.ndim - 2
    exact = jnp.asarray(weight, jnp.float32)
    off = exact - dequantize(quantize(exact, config, stacked=stacked))
    mean_square = jnp.mean(exact**2, axis=(-2, -1))
    per_block = jnp.sqrt(_block_sums(off, config) / jnp.maximum(_block_sums(exact, config), _TINY))
    beyond = jnp.abs(exact) > 6 * jnp.sqrt(mean_square)[..., None, None]
    return QuantizationError(
        rms=jnp.sqrt(jnp.mean(off**2, axis=(-2, -1)) / jnp.maximum(mean_square, _TINY)),
        worst=per_block.max(axis=(-2, -1)),
        outliers=jnp.mean(beyond.astype(jnp.float32), axis=(-2, -1)),
    )


_TINY = float(jnp.finfo(jnp.float32).tiny)


def _block_sums(x: Array, config: QuantConfig) -> Array:
    """Sums of squares `(*stack, G, d_out)`."""
    size = min(config.block_size, x.shape[-2])
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:-2], -1, size, x.shape[-1])
    return jnp.sum(blocks**2, axis=-2)
