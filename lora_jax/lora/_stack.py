"""Several adapters of one base as one tree, along a new first axis."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .._errors import InputError
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Array, Params

RANK_AXES = {"lora_A": -1, "lora_B": -2}
"""Which axis of a factor is its rank."""


def stack_adapters(adapters: Sequence[Params], rank: int | None = None) -> dict[str, Any]:
    """Adapters stacked along a new first axis, padded with zeros to one rank.

    Zeros change neither a delta nor, since each factor's are met by the other's, any gradient:
    under `jax.vmap` each adapter trains as it would alone.

    Args:
        adapters: Of the same modules of one base; ranks and scalings may differ.
        rank: What to pad to; the largest rank by default.

    Raises:
        InputError: if their modules or shapes differ, or one's rank is above `rank`.

    Example:
        >>> one = {"q": {"lora_A": jnp.ones((4, 1)), "lora_B": jnp.ones((1, 6))}}
        >>> two = {"q": {"lora_A": jnp.ones((4, 3)), "lora_B": jnp.ones((3, 6))}}
        >>> stacked = stack_adapters([one, two])
        >>> stacked["q"]["lora_A"].shape, stacked["q"]["lora_B"].shape
        ((2, 4, 3), (2, 3, 6))
    """
    several = [dict(leaves_with_path(adapter)) for adapter in adapters]
    if not several:
        raise InputError("stack_adapters: there is no adapter to stack")
    for other in several[1:]:
        if differing := sorted(other.keys() ^ several[0].keys()):
            raise InputError(
                f"stack_adapters: {differing[0]} is in one adapter and not in another; stack"
                " adapters of the same modules"
            )
    return tree_from_paths(
        {path: _stacked(path, [leaves[path] for leaves in several], rank) for path in several[0]}
    )


def _stacked(path: str, leaves: list[Any], rank: int | None) -> Array:
    axis = rank_axis(path)
    if axis is not None:
        largest = max(leaf.shape[axis] for leaf in leaves) if rank is None else rank
        leaves = [pad_rank(path, leaf, largest) for leaf in leaves]
    if len({(leaf.shape, leaf.dtype) for leaf in leaves}) > 1:
        found = " and ".join(dict.fromkeys(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves))
        raise InputError(f"stack_adapters: {path} is {found}; stack adapters of the same base")
    return jnp.stack(leaves)


def rank_axis(path: str) -> int | None:
    """The axis of a leaf that is the rank, counted from its end; None where none is.

    Example:
        >>> rank_axis("q_proj/lora_B"), rank_axis("q_proj/lora_scaling")
        (-2, None)
    """
    return next((axis for name, axis in RANK_AXES.items() if path.endswith(name)), None)


def pad_rank(path: str, leaf: Any, rank: int) -> Any:
    """A factor with zeros up to `rank`; any other leaf as it is.

    Raises:
        InputError: if its rank is above that.
    """
    axis = rank_axis(path)
    if axis is None:
        return leaf
    if leaf.shape[axis] > rank:
        raise InputError(f"{path}: has rank {leaf.shape[axis]}, and there is room for {rank}")
    pads = [(0, 0)] * leaf.ndim
    pads[axis] = (0, rank - leaf.shape[axis])
    return jnp.pad(leaf, pads)


def take_adapter(stacked: Params, index: int, like: Params) -> dict[str, Any]:
    """One of several adapters, without its padding; the inverse of `stack_adapters`.

    Args:
        stacked: As from `stack_adapters`.
        index: Which one.
        like: That adapter, or its shapes, as it was before.

    Example:
        >>> one = {"q": {"lora_A": jnp.ones((4, 1)), "lora_B": jnp.ones((1, 6))}}
        >>> take_adapter(stack_adapters([one], rank=8), 0, one)["q"]["lora_A"].shape
        (4, 1)
    """
    shapes = {path: leaf.shape for path, leaf in leaves_with_path(like)}
    return tree_from_paths(
        {
            path: leaf[(index, *(slice(size) for size in shapes[path]))]
            for path, leaf in leaves_with_path(stacked)
        }
    )
