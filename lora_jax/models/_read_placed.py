"""Tensors of a checkpoint made into leaves over a mesh: each process reads its devices' part."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
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
    cut = NamedSharding(_mesh(leaf), PartitionSpec(*(axes[::-1] if transpose else axes)))
    convert = _Conversion(transpose, quant, contracted_axes(path))
    write = _writer(convert, _shardings(leaf))
    arrays = _zeros(leaf)
    for index, part in zip(np.ndindex(stack), parts, strict=True):
        tensor = _over_devices(part.shape, cut, part.read)
        # Waiting for the answer keeps one layer at a time in memory.
        arrays, finite = write(arrays, tensor, index)
        check_finite(part, quant is None or finite)
    return jax.tree.unflatten(jax.tree.structure(leaf), arrays)


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
    leaf = place(
        path, jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), first)
    )
    write = _writer(None, _shardings(leaf))
    cuts = [
        NamedSharding(x.sharding.mesh, PartitionSpec(*_axes(x)[len(stack) :]))
        for x in jax.tree.leaves(leaf)
    ]
    arrays = _zeros(leaf)
    for index, layer in zip(np.ndindex(stack), itertools.chain([first], layers), strict=True):
        wholes = [np.asarray(x) for x in jax.tree.leaves(layer)]
        cut = [_over_devices(x.shape, s, x.__getitem__) for x, s in zip(wholes, cuts, strict=True)]
        arrays, _ = jax.block_until_ready(write(arrays, cut, index))
    return jax.tree.unflatten(jax.tree.structure(leaf), arrays)


def _over_devices(shape: tuple[int, ...], sharding: NamedSharding, read: Any) -> jax.Array:
    """One array over a mesh; a range that several devices of this process hold is read once."""
    held: dict[Any, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
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
        finite = True if convert is None else jnp.isfinite(tensor).all()
        return [
            s.at[index].set(x.astype(s.dtype)) for s, x in zip(arrays, layer, strict=True)
        ], finite

    # Every process reads the answer, so each holds it whole.
    whole = NamedSharding(shardings[0].mesh, PartitionSpec())
    return jax.jit(write, donate_argnums=0, out_shardings=(list(shardings), whole))


def _zeros(leaf: Any) -> list[Array]:
    return [jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in jax.tree.leaves(leaf)]


def _weight_axes(leaf: Any, stacked: int) -> tuple[Any, ...]:
    """The mesh axes that cut one layer's weight: those of its codes, or of the dense leaf."""
    if not isinstance(leaf, QuantizedTensor):
        return _axes(leaf)[stacked:]
    blocks, _, columns = _axes(leaf.codes)[stacked:]
    # Where the last block is padded, equal parts of the rows do not end with blocks.
    rows = None if leaf.d_in % leaf.block_size else blocks
    return tuple(rows if axis in leaf.contracting else columns for axis in range(2))


def _axes(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each axis of an abstract array."""
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


def _shardings(leaf: Any) -> tuple[NamedSharding, ...]:
    return tuple(x.sharding for x in jax.tree.leaves(leaf))


def _mesh(leaf: Any) -> Any:
    return _shardings(leaf)[0].mesh
