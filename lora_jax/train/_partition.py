"""How arrays are cut over a mesh: one table from the names of axes to axes of the mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .._errors import InputError, nearest
from .._tree import leaves_with_path, map_with_path
from .._typing import Params
from ..models import ModelConfig, logical_axes
from ..quant import QuantizedTensor, partition_specs
from ._mesh import AXES, BATCH_AXES, divisors

RULES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "table_embed": (),
    "adapter_embed": (),
    "layers": (),
    "rank": (),
    "whole": (),
    "moments": (),
}
"""Which axes of the mesh cut an axis of parameters; `moments` of the optimizer are cut besides.

Embedding and head are not cut by `fsdp`: they would have to be gathered in floats.  Full training
cuts them (`RULES_OF_FULL`), since optimizer state is many times their size.
"""
RULES_OF_FULL = {**RULES, "table_embed": ("fsdp",)}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh, the rules, and the model whose parameters they cut.

    Args:
        mesh: With the axes `data`, `fsdp`, `sequence` and `tensor`.
        rules: As `RULES`.
        config: The model's shape.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]]
    config: ModelConfig

    def place(self, path: str, leaf: Any) -> Any:
        """A leaf's shapes with the sharding of each array.

        Raises:
            InputError: if an axis of the mesh does not divide what it is to cut.
        """
        spec = self._spec(path, leaf)
        if not isinstance(leaf, QuantizedTensor):
            return self._shape(leaf, PartitionSpec(*spec))
        ndim = len(leaf.kernel_shape)
        stack, kernel = tuple(spec[: leaf.ndim - ndim]), spec[leaf.ndim - ndim :]
        features = [i for i in range(ndim) if i not in leaf.contracting]
        rows = _joined(kernel[i] for i in leaf.contracting)
        columns = _joined(kernel[i] for i in features)
        if leaf.flat:  # blocks run over columns: kept whole
            rows = columns = ()
        specs = partition_specs(leaf, rows or None, columns or None, stack)
        used = tuple(tuple(a for a in axes if a not in BATCH_AXES) for axes in (rows, columns))
        placed = jax.tree.map(self._shape, leaf, specs)
        return dataclasses.replace(placed, in_use=used if rows or columns else None)

    def put(self, tree: Params) -> Params:
        """A tree's arrays, which every process has whole or cut already, cut over the mesh.

        Of shapes, the shapes with their shardings.
        """

        def of(path: str, leaf: Any) -> Any:
            placed = self.place(path, leaf)
            if isinstance(leaf, QuantizedTensor):
                leaf = dataclasses.replace(leaf, in_use=placed.in_use)
            return jax.tree.map(_put, leaf, placed)

        return map_with_path(of, tree)

    def state(self, state: Any, *, offload: bool = False) -> Any:
        """Shardings of a `TrainState`: moments are cut as what they are moments of.

        Args:
            state: The state, or its shapes.
            offload: Whether the optimizer's arrays are in the hosts' memory between updates.
        """
        trained = leaves_with_path(map_with_path(self.place, state.trainable))
        known = {(path, x.shape): x.sharding for path, x in trained}

        def of(keys: Any, x: Any) -> NamedSharding:
            names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in keys]
            paths = ("/".join(names[i:j]) for i in range(len(names)) for j in (len(names), -1))
            found = (known[path, x.shape] for path in paths if (path, x.shape) in known)
            sharding = next(found, self.whole)
            if names[0] == "opt_state" and x.ndim:
                sharding = self._moment(sharding, x.shape)
                return sharding.with_memory_kind("pinned_host") if offload else sharding
            return sharding

        return jax.tree_util.tree_map_with_path(of, state)

    def _moment(self, sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
        """Cut besides by what the rule says, along the last axis that is whole and divides."""
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        parts = math.prod(self.mesh.shape[axis] for axis in self.rules["moments"])
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % parts == 0]
        if parts > 1 and free and not set(self.rules["moments"]) & set(_joined(spec)):
            spec[free[-1]] = self.rules["moments"]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays (..., batch, seq), each device's rows on it.

        Rows that lie on another host's devices may hold anything here.
        """

        def put(x: np.ndarray) -> jax.Array:
            like = self.batch_shape(x.shape, x.dtype)
            padding = [(0, new - old) for old, new in zip(x.shape, like.shape, strict=True)]
            x = np.pad(x, padding)
            return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

        return {name: put(x) for name, x in arrays.items()}

    def own_rows(self, batch_size: int) -> set[int]:
        """The rows of a batch of which this process's devices hold anything."""
        like = self.batch_shape((batch_size, self.mesh.shape["sequence"]), np.int32)
        held = like.sharding.addressable_devices_indices_map(like.shape).values()
        return {row for index in held if index for row in range(*index[0].indices(batch_size))}

    def batch_shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array (..., batch, seq) as a step takes it: with empty rows until all have as many."""
        *lead, rows, seq = shape
        rows += -rows % math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        spec = PartitionSpec(*[None] * len(lead), BATCH_AXES, "sequence")
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct((*lead, rows, seq), dtype, sharding=sharding)

    def _shape(self, x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def _spec(self, path: str, leaf: Any) -> list[tuple[str, ...] | None]:
        """Mesh axes of each axis of the dense leaf."""
        return [
            self._axes(path, name, parts) or None
            for name, parts in _most_parts(path, leaf, self.config)
        ]

    def _axes(self, path: str, name: str, size: int) -> tuple[str, ...]:
        axes = tuple(a for a in self.rules[name] if self.mesh.shape[a] > 1)
        parts = math.prod(self.mesh.shape[a] for a in axes)
        if size % parts == 0:
            return axes
        if name == "kv_heads":  # Every device has them all, as wherever there are few.
            return ()
        raise InputError(
            f"mesh: {' · '.join(axes)} is {parts}, which does not divide {path}: its axis {name!r}"
            f" has {size} parts; use one of {divisors(size)}, or keep it whole:"
            f" mesh.rules.{name}: []"
        )


def _most_parts(path: str, leaf: Any, config: ModelConfig) -> list[tuple[str, int]]:
    """The name of each axis of the dense leaf, and into how many equal parts it can be cut."""
    names, sizes = logical_axes(path, config.family, leaf.ndim), list(leaf.shape)
    if isinstance(leaf, QuantizedTensor):  # between blocks only
        sizes[leaf.ndim - len(leaf.kernel_shape) + leaf.contracting[0]] = leaf.codes.shape[-3]
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    return [
        (name, math.gcd(size, heads.get(name, 0))) for name, size in zip(names, sizes, strict=True)
    ]


def parts_of_width(params: Params, config: ModelConfig) -> int:
    """Into how many parts the model's width can be cut in all kernels of the blocks."""
    named = (
        pair for path, leaf in leaves_with_path(params) for pair in _most_parts(path, leaf, config)
    )
    return math.gcd(*(parts for name, parts in named if name == "embed"))


def _put(x: Any, like: jax.ShapeDtypeStruct) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return like
    if getattr(x, "sharding", None) == like.sharding:
        return x
    if like.sharding.is_fully_addressable:
        return jax.device_put(x, like.sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=like.sharding)(x)
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, like.sharding, lambda index: whole[index])


def read_rules(given: Mapping[str, list[str]], full: bool) -> dict[str, tuple[str, ...]]:
    """The table with a config's `mesh.rules` laid over it.

    Raises:
        InputError: for a name that is no axis.
    """
    for name, axes in given.items():
        if name not in RULES:
            known = ", ".join(RULES)
            raise InputError(
                f"mesh.rules: unknown axis {name!r}{nearest(name, RULES)}; known: {known}"
            )
        for axis in axes:
            if axis not in AXES:
                raise InputError(
                    f"mesh.rules.{name}: unknown axis {axis!r} of the mesh{nearest(axis, AXES)};"
                    f" known: {', '.join(AXES)}"
                )
    return {**(RULES_OF_FULL if full else RULES), **{k: tuple(v) for k, v in given.items()}}


def _joined(parts: Any) -> tuple[str, ...]:
    flat = ((part,) if isinstance(part, str) else part or () for part in parts)
    return tuple(axis for axes in flat for axis in axes)
