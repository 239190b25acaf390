"""An optimizer that sees the trainable leaves only."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from .._tree import combine, leaves_with_path, map_with_path, partition
from .._typing import Params
from ..lora import trainable_mask


def freeze_base(
    tx: optax.GradientTransformation,
    mask: Callable[[Params], Params] = trainable_mask,
) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to the trainable leaves and leave every other leaf bit for bit as it is.

    `optax.masked` alone passes the gradients of masked-out leaves through as their updates,
    so applying them would move frozen weights up their gradient.  Here their updates are
    zero, and `tx` keeps no state for them.  It may read them: what has a use for extra
    arguments gets their weights as `frozen_params`.

    Args:
        tx: Any optax transformation.
        mask: From the params tree to booleans, True where trainable.  The default trains
            `lora_A` and `lora_B`; with `modules_to_save` or `bias`, give
            `lambda params: trainable_mask(params, config)`.

    Returns:
        A transformation for the whole tree.  Put transformations with a memory, such as
        `optax.MultiSteps`, inside: outside they keep state for frozen leaves too.

    Example:
        >>> params = {"q": {"kernel": jnp.ones(2), "lora_A": jnp.ones(2)}}
        >>> tx = freeze_base(optax.sgd(0.5))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["q"]["kernel"].tolist()
        [1.0, 1.0]
        >>> optax.apply_updates(params, updates)["q"]["lora_A"].tolist()
        [0.5, 0.5]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> optax.OptState:
        return tx.init(partition(params, mask(params))[0])

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        if params is not None:
            chex.assert_trees_all_equal_structs(updates, params)
        chosen = mask(updates if params is None else params)
        trainable, frozen = partition(updates, chosen)
        weights = None
        if params is not None:
            # Zeros like the weights, not the updates: integers have no gradient of their type.
            weights, frozen = partition(params, chosen)
            # Those that a `freeze_base` around this one holds are frozen here too.
            extra["frozen_params"] = combine(extra.get("frozen_params", {}), frozen)
        moved: Any
        moved, state = tx.update(trainable, state, weights, **extra)
        leaves = dict(leaves_with_path(combine(jax.tree.map(_no_change, frozen), moved)))
        return map_with_path(lambda path, _: leaves[path], updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _no_change(leaf: jax.Array) -> jax.Array:
    # -0.0, not 0.0: adding it changes no float at all, while -0.0 + 0.0 would become +0.0.
    zero = jnp.zeros_like(leaf)
    return -zero if jnp.issubdtype(zero.dtype, jnp.floating) else zero
