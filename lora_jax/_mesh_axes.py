"""How many devices stand along axes of the mesh that a function is being compiled for."""

import math
from typing import Any

import jax

OPEN = jax.sharding.PartitionSpec.UNCONSTRAINED
"""An axis that the compiler may cut as it likes."""


def mesh_size(*axes: str) -> int:
    """The product of the sizes of these axes; 1 without a mesh, and inside `jax.shard_map`.

    Axes that the mesh does not have count 1.

    Example:
        >>> mesh_size("data", "fsdp")
        1
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def cut(x: jax.Array, *axes: Any) -> jax.Array:
    """An array cut by these axes of the mesh that is compiled for; itself where there is none.

    Args:
        x: The array.
        axes: For each of its axes the axis or axes of the mesh, `OPEN`, or None; missing ones are
            None.

    Example:
        >>> cut(jax.numpy.ones((4, 8)), ("data", "fsdp")).shape
        (4, 8)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*axes))
