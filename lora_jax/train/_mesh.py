"""The mesh of a run: its devices by named axes, and how much each of them has."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from .._errors import InputError
from ._config import MeshSection

AXES = ("data", "fsdp", "sequence", "tensor")
"""Outermost first: what exchanges most stands last, where devices are nearest to each other."""
BATCH_AXES = ("data", "fsdp")
"""What the rows of a batch are cut by."""
ROOM_FOR_WEIGHTS = 0.5
"""Share of a device's memory above which frozen weights are cut rather than copied."""


def make_mesh(
    section: MeshSection, devices: Sequence[Any], needs: "Needs | None" = None
) -> jax.sharding.Mesh:
    """The mesh that a config asks for, over these devices.

    Args:
        section: The config's.
        devices: All devices, those of other hosts too.
        needs: What tells whether weights are copied or cut.

    Raises:
        InputError: if the axes do not make as many devices as there are.
    """
    shape = mesh_shape(section, len(devices), needs or Needs())
    # On a TPU's torus an axis may need part of a physical one: 8 of 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices, allow_split_physical_axes=True
    )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(placed, AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a device would have to hold of weights.

    `weights`: bytes between steps, if nothing is cut.  `memory`: bytes of a device; None where
    nobody knows.  `parts`: into how many parts `fsdp` can cut them at most, or a divisor of that.
    """

    weights: int = 0
    memory: float | None = None
    parts: int = 0


def mesh_shape(section: MeshSection, count: int, needs: Needs) -> dict[str, int]:
    """Devices along each axis.

    What the config leaves open takes all devices that are left: `data`, or `fsdp`, as far as it
    can, if the weights fill more than half of a device.

    Example:
        >>> mesh_shape(MeshSection(tensor=2), 8, Needs())
        {'data': 4, 'fsdp': 1, 'sequence': 1, 'tensor': 2}
        >>> mesh_shape(MeshSection(), 8, Needs(weights=40, memory=60, parts=4))
        {'data': 2, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
    """
    given = {axis: getattr(section, axis) for axis in AXES}
    taken = math.prod(n for n in given.values() if n is not None)
    told = ", ".join(f"{axis} {n}" for axis, n in given.items() if n not in (None, 1))
    if count % taken:
        raise InputError(
            f"mesh: {told} make {taken}, which does not divide the {count} devices; their product"
            f" has to be one of {divisors(count)}"
        )
    left, per_device = count // taken, needs.weights / given["tensor"] / (given["fsdp"] or 1)
    large = needs.memory is not None and per_device > ROOM_FOR_WEIGHTS * needs.memory
    filled = {axis: 1 if n is None else n for axis, n in given.items()}
    if given["fsdp"] is None and (large or given["data"] is not None):
        filled["fsdp"] = left if given["data"] is not None else math.gcd(left, needs.parts)
    if given["data"] is None:
        filled["data"] = left // (filled["fsdp"] if given["fsdp"] is None else 1)
    if math.prod(filled.values()) != count:
        raise InputError(
            f"mesh: {told or 'data 1, fsdp 1'} make {taken} devices, but there are {count}; leave"
            f" mesh.data out, or set it to {filled['data'] * left}"
        )
    return filled


def device_memory() -> float | None:
    """Bytes of this process's smallest device, if they tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return None if None in limits else min(limits)  # type: ignore[type-var]


def idle_note(batch_size: int, shape: Mapping[str, int]) -> str | None:
    """What to know of a batch whose rows do not fill the devices evenly; None if they do.

    Example:
        >>> idle_note(6, {"data": 4})
        'train.batch_size 6 leaves 2 of 8 rows empty; a multiple of 4 (data 4) fills all devices'
    """
    axes = {axis: shape[axis] for axis in BATCH_AXES if shape.get(axis, 1) > 1}
    parts = math.prod(axes.values())
    empty = -batch_size % parts
    if not empty:
        return None
    told = " x ".join(f"{axis} {n}" for axis, n in axes.items())
    return (
        f"train.batch_size {batch_size} leaves {empty} of {batch_size + empty} rows empty; a"
        f" multiple of {parts} ({told}) fills all devices"
    )


def divisors(n: int) -> str:
    """All of them, to choose one from."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
