"""A weight matrix in four bits, as a pytree that Flax modules read like a dense one."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import Float

from .._errors import InputError
from .._typing import Array
from ._codebook import dynamic_values, lookup, unpack

GROUP = 256  # absmax values under one nested absmax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "nested_scales", "offset"],
    meta_fields=["format", "block_size", "kernel_shape", "contracting", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor(meta.AxisMetadata[Any]):
    """A kernel of blockwise 4-bit codes; `quantize` makes one, `dequantize` reads it.

    A kernel is flattened to `(d_in, d_out)` and padded with zeros to G pairs of blocks of
    b rows. Row i of pair g's two blocks share a byte:

        W[(2g + h)·b + i, o] = codebook[nibble h of codes[g, i, o]] · absmax[g, h, o]

    As `flax.core.meta.AxisMetadata` it may stand where a module expects a dense parameter:
    `self.param` unboxes it when it is read, so inside a scanned and rematerialized body one
    layer at a time is dense. `meta.unbox(tree)` makes the whole tree dense.

    Args:
        codes: uint8 `(*stack, G, b, d_out)`; the high nibble belongs to the pair's first block.
        scales: `(*stack, G, 2, d_out)`: float32 absmax, or uint8 codes of it (double
            quantization).
        nested_scales: float32 `(*stack, groups)`, absmax of 256 centred absmax values in the
            order (d_out, block); None without double quantization.
        offset: float32 `(*stack,)`, the mean absmax of a matrix; None likewise.
        format: `"nf4"` or `"int4"`.
        block_size: b, rows that share one absmax.
        kernel_shape: Shape of one dense kernel, without stack axes.
        contracting: How many leading axes of `kernel_shape` make up d_in.
        dtype: Dtype of the dense kernel.

    Example:
        >>> from lora_jax.quant import quantize
        >>> q = quantize(jnp.ones((2, 128, 8), jnp.bfloat16), stacked=1)
        >>> q.shape, q.codes.shape, q.unbox().dtype
        ((2, 128, 8), (2, 1, 64, 8), dtype(bfloat16))
    """

    # Transformations rebuild pytrees with tracers, shapes, None or bare objects for children.
    codes: Any
    scales: Any
    nested_scales: Any
    offset: Any
    format: str
    block_size: int
    kernel_shape: tuple[int, ...]
    contracting: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, stack axes first."""
        return (*self.codes.shape[:-3], *self.kernel_shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the dense weight."""
        return len(self.shape)

    @property
    def d_in(self) -> int:
        """Rows of the flattened kernel, padding excluded."""
        return math.prod(self.kernel_shape[: self.contracting])

    @property
    def d_out(self) -> int:
        """Columns of the flattened kernel."""
        return math.prod(self.kernel_shape[self.contracting :])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def unbox(self) -> Any:
        """The dense weight in its own shape and dtype."""
        return dequantize(self)

    def replace_boxed(self, val: Any) -> Any:
        """The new value itself: what replaces a frozen weight is not quantized."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedTensor":
        """Itself: stack axes are known from the arrays alone."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedTensor":
        """Itself: stack axes are known from the arrays alone."""
        return self


def dequantize(q: QuantizedTensor, dtype: Any = None) -> Float[Array, "..."]:
    """The dense weight, `codebook[index] · absmax` computed in float32 and rounded once.

    Args:
        q: A quantized kernel, stacked or not.
        dtype: Dtype of the result; the quantized kernel's own by default.

    Returns:
        Array of shape `q.shape`.

    Raises:
        InputError: if `dtype` is not a float type.

    Example:
        >>> from lora_jax.quant import quantize
        >>> dequantize(quantize(jnp.array([[1.0], [-0.5]])))[:, 0].tolist()
        [1.0, -0.5250730514526367]

    Source: Dettmers et al. 2023, "QLoRA", equation 6.
    """
    dtype = q.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dequantize: dtype must be a float type, got {dtype}; use float32")
    return _dequantize(q, dtype)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(q: QuantizedTensor, dtype: Any) -> Array:
    scales = absmax(q)
    halves = [
        lookup(nibbles, q.format) * scales[..., half, None, :]
        for half, nibbles in enumerate(unpack(q.codes))
    ]
    # One array of pairs, not one per half: the reshape that follows then moves nothing.
    rows = jnp.stack(halves, axis=-3).astype(dtype)
    rows = rows.reshape(*q.codes.shape[:-3], -1, q.d_out)
    return rows[..., : q.d_in, :].reshape(q.shape)


def absmax(q: QuantizedTensor) -> Array:
    """Float32 absmax `(*stack, G, 2, d_out)` of every block."""
    if q.offset is None:
        return q.scales
    offset = q.offset[..., None, None, None]
    return dynamic_values(q.scales) * _nested_per_block(q) + offset


def _nested_per_block(q: QuantizedTensor) -> Array:
    """Each block's nested absmax, from flat groups back to `(*stack, G, 2, d_out)`."""
    *stack, pairs, _, d_out = q.scales.shape
    blocks = -(-q.d_in // q.block_size)
    flat = jnp.repeat(q.nested_scales, GROUP, axis=-1)[..., : d_out * blocks]
    by_block = flat.reshape(*stack, d_out, blocks).swapaxes(-1, -2)
    padding = [(0, 0)] * len(stack) + [(0, 2 * pairs - blocks), (0, 0)]
    return jnp.pad(by_block, padding).reshape(q.scales.shape)
