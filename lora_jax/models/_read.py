"""Tensors of a checkpoint made into leaves, one at a time, quantized on the way."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from .._names import is_kernel, is_transposed
from .._quant_config import QuantConfig
from ..quant import QuantizedTensor, quantize
from ._checkpoint import DTYPES, Entry
from ._families import Family
from ._formats import contracted_axes, stacked_axes, stored_shape

_ALIGNMENT = 64
"""Bytes at which an array must begin for JAX to take a CPU's memory as it is."""


def read_leaf(
    path: str,
    parts: list[Entry],
    quant: QuantConfig | None,
    param_dtype: str | None,
    family: Family,
) -> Any:
    """Read one leaf; a stack is allocated once and filled, so one layer at most is twice there.

    Args:
        path: The leaf's path in the tree.
        parts: Its tensors, one for each layer of a stack.
        quant: The format it is quantized to; None keeps it dense, or as bitsandbytes has it.
        param_dtype: Of a dense leaf; None keeps the file's.
        family: Whose tree it is.

    Raises:
        InputError: for a weight that is to be quantized and not finite, or is quantized already.
    """
    dtype = dtype_of(parts, param_dtype)
    if any(part.state for part in parts):
        return _read_quantized(path, parts, quant, dtype, family)
    transpose = is_transposed(path)
    if not stacked_axes(path, family):
        tensor = _read(parts[0], transpose, finite=quant is not None)
        if quant is None:
            return tensor.astype(dtype)
        return _quantized(tensor, quant, contracting=contracted_axes(path), dtype=dtype)
    shape = parts[0].shape[::-1] if transpose else parts[0].shape
    if quant is None and jax.default_backend() == "cpu":
        return _read_on_host(parts, (len(parts), *shape), dtype, transpose)
    stack = stored_shape(path, jax.ShapeDtypeStruct((len(parts), *shape), dtype), quant, family)
    stack = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stack)
    for i, part in enumerate(parts):
        tensor = _read(part, transpose, finite=quant is not None)
        # Without waiting, many tensors are read before the first is written.
        stack = jax.block_until_ready(_fill(stack, tensor, i, quant=quant))
    return stack


def dtype_of(parts: list[Entry], param_dtype: str | None) -> Any:
    """The dtype of the leaf that tensors become."""
    return jnp.dtype(param_dtype or jnp.result_type(*(DTYPES[part.dtype] for part in parts)))


def _read(part: Entry, transpose: bool, *, finite: bool = False) -> jax.Array:
    """A tensor, or its transpose, on the device."""
    tensor = _read_finite(part) if finite else part.read()
    if transpose and jax.default_backend() != "cpu":
        return _transposed(tensor)
    # What JAX copies from the host it turns on the way, at 2.2 GB/s where a program takes 0.6.
    return jax.device_put(tensor.T if transpose else tensor)


_transposed = jax.jit(jnp.transpose)


def _read_on_host(
    parts: list[Entry], shape: tuple[int, ...], dtype: Any, transpose: bool
) -> jax.Array:
    """A dense stack in memory that a CPU's arrays can be views of.

    Writing layers into a stack by a program took 2.6 times as long (bfloat16, 16 x 2048 x 5632).
    """
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    stack = room[begin : begin + size].view(dtype).reshape(shape)
    for layer, part in zip(stack, parts, strict=True):
        layer[...] = np.asarray(_read(part, transpose).astype(dtype))
    return jax.device_put(stack, may_alias=True)


def _read_quantized(
    path: str, parts: list[Entry], quant: QuantConfig | None, dtype: Any, family: Family
) -> QuantizedTensor:
    """A kernel, or a stack of them, that bitsandbytes quantized; they stay as they are."""
    layers = quantized_layers(path, parts, quant, dtype)
    first = next(layers)
    if not stacked_axes(path, family):
        return first
    stack = _stack_of_zeros(first, len(parts))
    for i, layer in enumerate(itertools.chain([first], layers)):
        stack = jax.block_until_ready(_fill(stack, layer, i, quant=None))
    return stack


def quantized_layers(
    path: str, parts: list[Entry], quant: QuantConfig | None, dtype: Any
) -> Iterator[QuantizedTensor]:
    """Kernels that bitsandbytes quantized, one at a time.

    Raises:
        InputError: where they are no kernels, differ, or are to be quantized again.
    """
    if not is_kernel(path):
        raise InputError(
            f"{parts[0].file}: {parts[0].key} is in four bits, which only kernels may be; keep it"
            " dense"
        )
    if quant is not None:
        raise InputError(
            f"{parts[0].file}: {parts[0].key} is in four bits already; leave quant out"
        )
    if dense := [part for part in parts if part.state is None]:
        raise InputError(
            f"{dense[0].file}: {dense[0].key} is not quantized, but {parts[0].key} or another layer"
            " of its stack is; quantize all layers alike, or none"
        )
    structure: Any = None
    for part in parts:
        layer = dataclasses.replace(part.read_quantized(), dtype=dtype)
        structure = structure or jax.tree.structure(layer)
        if jax.tree.structure(layer) != structure:
            raise InputError(
                f"{part.file}: {part.key} is quantized otherwise than {parts[0].key}; quantize all"
                " layers alike"
            )
        yield layer


@functools.partial(jax.jit, static_argnames="quant", donate_argnums=0)
def _fill(stack: Any, layer: Any, i: Any, *, quant: QuantConfig | None) -> Any:
    """Write one layer into a stack, in place."""
    if quant is not None:
        layer = _quantized(layer, quant, contracting=1, dtype=stack.dtype)
    return jax.tree.map(lambda s, x: s.at[i].set(x.astype(s.dtype)), stack, layer)


@functools.partial(jax.jit, static_argnames=("quant", "contracting", "dtype"))
def _quantized(tensor: Any, quant: QuantConfig, *, contracting: Any, dtype: Any) -> QuantizedTensor:
    """Quantized from the file's own precision, whatever type it opens to."""
    return dataclasses.replace(quantize(tensor, quant, contracting=contracting), dtype=dtype)


def _stack_of_zeros(layer: Any, layers: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((layers, *np.shape(x)), x.dtype), layer)


def _read_finite(part: Entry) -> np.ndarray:
    """A tensor that is to be quantized; NaN and infinity are refused by its name."""
    tensor = part.read()
    check_finite(part, np.isfinite(tensor).all())
    return tensor


def check_finite(part: Entry, finite: Any) -> None:
    """Refuse a tensor that holds what cannot be quantized."""
    if not finite:
        raise InputError(
            f"{part.file}: {part.key} holds weights that are not finite, which cannot be"
            " quantized; the file is damaged, copy it again"
        )
