"""Tensors of a checkpoint made into leaves over a mesh: each process reads its devices' part."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._names import is_transposed
from .._quant_config import QuantConfig
from .._typing import Array
from ..quant import QuantizedTensor, quantize
from ._checkpoint import Entry
from ._families import Family
from ._formats import contracted_axes, stacked_axes, stored_shape
from ._read import check_finite, dtype_of, quantized_layers

Place = Callable[[str, Any], Any]
"""From a leaf's path and shapes to the same leaf, whose shapes tell where they belong."""


def read_placed(
    path: str,
    parts: list[Entry],
    quant: QuantConfig | None,
    param_dtype: str | None,
    family: Family,
    *,
    place: Place,
) -> Any:
    """`read_leaf` over a mesh: every array is cut as `place` tells while it is read.

    A layer's weights are one array over all devices, which is quantized where it is cut, so no
    process sees more of them than its own devices hold. All processes call this alike.

    Args:
        path: The leaf's path in the tree.
        parts: Its tensors, one for each layer of a stack.
        quant: The format it is quantized to; None keeps it dense, or as bitsandbytes has it.
        param_dtype: Of a dense leaf; None keeps the file's.
        family: Whose tree it is.
        place: Gives each array of the leaf its `NamedSharding`.

    Raises:
        InputError: as `read_leaf`, in every process alike.
    """
    dtype = dtype_of(parts, param_dtype)
    stack = (len(parts),) * stacked_axes(path, family)
    if any(part.state for part in parts):
        return _place_quantized(path, parts, quant, dtype, stack, place)
    transpose = is_transposed(path)
    shape = parts[0].shape[::-1] if transpose else parts[0].shape
    weight = jax.ShapeDtypeStruct((*stack, *shape), dtype)
    leaf = place(path, stored_shape(path, weight, quant, family))
    axes = _weight_axes(leaf, len(stack))
    cut = _cut_by(axes[::-1] if transpose else axes, jax.tree.leaves(leaf)[0])
    convert = _Conversion(transpose, quant, contracted_axes(path))
    tensors = (_spread(part.shape, cut, part.read) for part in parts)
    return _written(leaf, convert, tensors, stack, parts)


def _place_quantized(
    path: str,
    parts: list[Entry],
    quant: QuantConfig | None,
    dtype: Any,
    stack: tuple[int, ...],
    place: Place,
) -> QuantizedTensor:
    """Kernels that bitsandbytes quantized: each process reads them whole, and keeps its part."""
    layers = quantized_layers(path, parts, quant, dtype)
    first = next(layers)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), first)
    leaf = place(path, shapes)
    cuts = [_cut_by(_axes(x)[len(stack) :], x) for x in jax.tree.leaves(leaf)]

    def spread(layer: QuantizedTensor) -> list[jax.Array]:
        wholes = [np.asarray(x) for x in jax.tree.leaves(layer)]
        return [_spread(x.shape, cut, x.__getitem__) for x, cut in zip(wholes, cuts, strict=True)]

    return _written(leaf, None, map(spread, itertools.chain([first], layers)), stack, parts)


def _written(
    leaf: Any,
    convert: "_Conversion | None",
    layers: Iterator[Any],
    stack: tuple[int, ...],
    parts: list[Entry],
) -> Any:
    """The leaf that layers make, written into it one after another."""
    shapes, structure = jax.tree.flatten(leaf)
    write = _writer(convert, tuple(x.sharding for x in shapes))
    arrays = [jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in shapes]
    for index, part in zip(np.ndindex(stack), parts, strict=True):
        # Waiting, and no name for the layer, keep one at a time in memory.
        arrays, finite = jax.block_until_ready(write(arrays, next(layers), index))
        check_finite(part, finite)
    return jax.tree.unflatten(structure, arrays)


def _spread(shape: tuple[int, ...], sharding: NamedSharding, read: Any) -> jax.Array:
    """One array over a mesh; a range that several devices of this process hold is read once."""
    held: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
        if bounds not in held:
            held[bounds] = read(index)
        return held[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """From a tensor as the file has it to the arrays of a layer."""

    transpose: bool
    quant: QuantConfig | None
    contracting: int | tuple[int, ...]

    def __call__(self, tensor: Array) -> list[Array]:
        weight = tensor.T if self.transpose else tensor
        if self.quant is None:
            return [weight]
        return jax.tree.leaves(quantize(weight, self.quant, contracting=self.contracting))


@functools.lru_cache(maxsize=64)
def _writer(convert: _Conversion | None, shardings: tuple[NamedSharding, ...]) -> Any:
    """Writes a layer into the arrays of a stack, in place; tells whether it is finite."""

    def write(arrays: list[Array], tensor: Any, index: tuple[Any, ...]) -> Any:
        layer = tensor if convert is None else convert(tensor)
        quantized = convert is not None and convert.quant is not None
        finite = jnp.isfinite(tensor).all() if quantized else True
        return [
            s.at[index].set(x.astype(s.dtype)) for s, x in zip(arrays, layer, strict=True)
        ], finite

    # Every process reads the answer, so each holds it whole.
    whole = NamedSharding(shardings[0].mesh, PartitionSpec())
    return jax.jit(write, donate_argnums=0, out_shardings=(list(shardings), whole))


def _weight_axes(leaf: Any, stacked: int) -> tuple[Any, ...]:
    """The mesh axes that cut one layer's weight: those of its codes, or of the dense leaf."""
    if not isinstance(leaf, QuantizedTensor):
        return _axes(leaf)[stacked:]
    blocks, _, columns = _axes(leaf.codes)[stacked:]
    # Where the last block is padded, equal parts of the rows do not end with blocks.
    rows = None if leaf.d_in % leaf.block_size else blocks
    return tuple(rows if axis in leaf.contracting else columns for axis in range(2))


def _cut_by(axes: tuple[Any, ...], x: Any) -> NamedSharding:
    """A sharding by these axes of an abstract array's mesh."""
    return NamedSharding(x.sharding.mesh, PartitionSpec(*axes))


def _axes(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each axis of an abstract array."""
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))
