"""Optimizer state in the memory of the host, on the device only while it is used."""

from typing import Any

import jax
import optax


def offload_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in host memory between updates; the updates are the same.

    Inside `update` the state is copied to the device, used, and copied back, so it takes no device
    memory during the forward and backward passes.  The copies cost the state's bytes over the
    host's bus, twice in each step, and the update itself may hold the state on the device, old and
    new (one leaf compiled for a TPU v5e does).  Where host and device are one memory (the CPU
    backend) it saves nothing.

    Args:
        tx: Any optax transformation.  Put this outermost: what wraps it would compute on arrays
            in host memory, as `optax.MultiSteps` and `optax.apply_if_finite` do.

    Returns:
        A transformation whose state has memory kind `pinned_host`, scalars aside.  Call `update`
        inside `jax.jit`.  Donate the params along with the state, and return both before anything
        else and in that order: JAX gives a donated array's memory to the first result of its shape
        and type, and the process is aborted where that result belongs in the other memory.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones(3)}
        >>> tx = offload_state(optax.adam(0.1))
        >>> _, state = jax.jit(tx.update)(params, tx.init(params))
        >>> state[0].mu["kernel"].sharding.memory_kind
        'pinned_host'
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> optax.OptState:
        return to_host(tx.init(params))

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        updates, state = tx.update(updates, to_device(state), params, **extra)
        return updates, to_host(state)

    return optax.GradientTransformationExtraArgs(init, update)


def to_host(tree: Any) -> Any:
    """Every array in pinned host memory, in or outside `jit`, its sharding otherwise as it is."""
    return jax.tree.map(lambda leaf: _move(leaf, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    """Every array in device memory, in or outside `jit`."""

    def move(leaf: Any) -> Any:
        # Whatever its type says: a ShapeDtypeStruct, or what orbax restores, may have a sharding in
        # host memory and yet be traced as if it were on the device.
        return jax.device_put(leaf, jax.memory.Space.Device) if leaf.ndim else leaf

    return jax.tree.map(move, tree)


def on_host(tree: Any) -> bool:
    """Whether any array is in host memory."""
    return any(_space(leaf) == jax.memory.Space.Host for leaf in jax.tree.leaves(tree))


def to_space_of(tree: Any, like: Any) -> Any:
    """Every array in the memory that its counterpart in `like` is in."""
    return jax.tree.map(lambda leaf, old: _move(leaf, _space(old)), tree, like)


def _space(leaf: Any) -> Any:
    return jax.typeof(leaf).memory_space


def _move(leaf: Any, space: Any) -> Any:
    # A scalar is not worth a copy: counters and schedules are read before anything else.
    if leaf.ndim == 0 or _space(leaf) == space:
        return leaf
    return jax.device_put(leaf, space)
