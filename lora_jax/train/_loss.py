"""Cross-entropy over the trained tokens, without all logits at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jaxtyping import Bool, Float, Int

from .._mesh_axes import mesh_size
from .._typing import Array


def next_token_loss(
    head: Callable[[Array], Array],
    hidden: Float[Array, "batch seq d"],
    input_ids: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
    *,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum over trained tokens of -log p(token | what stands before), and their number.

    The logits of `chunk` tokens exist at a time.  Under a frozen head their gradient is taken
    while they do, so that they are computed once; a trained head computes them again.  In each
    row the tokens that are trained on come first, and chunks without any are skipped: where
    answers are short and chunks small, most of the head's work is saved.

    Args:
        head: From hidden states (tokens, d) to logits (tokens, vocab).
        hidden: Last hidden states.
        input_ids: Token ids; position t is predicted from the hidden state at t - 1.
        loss_mask: True where a token counts as a target.
        chunk: Tokens per chunk on each device (at least one of each row).

    Returns:
        (loss summed in nats, number of trained tokens).

    Example:
        >>> ids = jnp.array([[0, 1, 1]])
        >>> loss, count = next_token_loss(lambda h: h, jnp.zeros((1, 3, 4)), ids, ids == 1)
        >>> round(float(loss / count), 4), int(count)     # log 4
        (1.3863, 2)
    """
    mask = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    states, targets, ours = map(_rows, (hidden, jnp.roll(input_ids, -1, axis=1), mask))
    (rows, seq), width = ours.shape, hidden.shape[2]
    # Within each row, so that none has to come from another device.
    order = jnp.argsort(~ours, axis=1, stable=True)
    length = min(max(chunk * mesh_size("data", "fsdp", "sequence") // rows, 1), seq)

    def chunks(x: Array) -> Array:
        """(chunks, rows, positions, ...), what is trained on first."""
        x = jax.vmap(_take)(x, order)
        x = jnp.pad(x, ((0, 0), (0, -seq % length), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(rows, -1, length, *x.shape[2:]).swapaxes(0, 1)

    # All that the head closes over becomes an argument: a trained part of it has a gradient.
    opened = jax.make_jaxpr(head)(jax.ShapeDtypeStruct((rows * length, width), hidden.dtype))
    return _loss(
        opened.jaxpr, chunks(states), opened.consts, chunks(targets), chunks(ours)
    ), jnp.sum(mask)


def _rows(x: Array) -> Array:
    """What a device has of a row as a row of its own, those of one device together."""
    parts = mesh_size("sequence")
    x = x.reshape(x.shape[0], parts, -1, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0).reshape(-1, *x.shape[2:])


def _take(x: Array, order: Array) -> Array:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _chunk_loss(head: Jaxpr, states: Array, weights: Any, targets: Array, mask: Array) -> Array:
    closed = ClosedJaxpr(head, weights)
    logits = jaxpr_as_fun(closed)(states.reshape(-1, states.shape[-1]))[0].astype(jnp.float32)
    # A gather needs the float32 logits in memory, and its gradient once more; a sum does not.
    ours = jax.nn.one_hot(targets.reshape(-1), logits.shape[-1], dtype=bool)
    picked = jnp.sum(jnp.where(ours, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(mask.reshape(-1), loss, 0.0))


def _sum_loss(head: Jaxpr, states: Array, weights: Any, targets: Array, mask: Array) -> Array:
    """The loss of all chunks."""

    def add(total: Array, part: Any) -> tuple[Array, None]:
        def loss() -> Array:
            states, targets, mask = part
            return total + _chunk_loss(head, states, weights, targets, mask)

        return jax.lax.cond(jnp.any(part[-1]), loss, lambda: total), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (states, targets, mask))[0]


def _sum_gradients(
    head: Jaxpr, states: Array, trained: Any, frozen: Any, targets: Array, mask: Array
) -> tuple[tuple[Array, Any], Array]:
    """((loss, gradient by what is trained of the head), gradient by the states)."""

    def chunk_loss(states: Array, trained: Any, targets: Array, mask: Array) -> Array:
        return _chunk_loss(head, states, _either(trained, frozen), targets, mask)

    def add(total: Any, part: Any) -> tuple[Any, Array]:
        def gradients() -> tuple[Any, Array]:
            states, targets, mask = part
            loss, (by_states, by_trained) = jax.value_and_grad(chunk_loss, (0, 1))(
                states, trained, targets, mask
            )
            return jax.tree.map(jnp.add, total, (loss, as_float32(by_trained))), by_states

        return jax.lax.cond(jnp.any(part[-1]), gradients, lambda: (total, jnp.zeros_like(part[0])))

    zeros = jax.tree.map(jnp.zeros_like, as_float32(trained))
    return jax.lax.scan(add, (jnp.zeros((), jnp.float32), zeros), (states, targets, mask))


_loss = jax.custom_vjp(_sum_loss, nondiff_argnums=(0,))


def _forward(head: Jaxpr, states: Any, weights: Any, targets: Any, mask: Any) -> tuple[Array, Any]:
    # None stands where the other one has the weight: how they divide is known while tracing.
    trained = [w.value if w.perturbed and _has_gradient(w.value) else None for w in weights]
    frozen = [w.value if t is None else None for w, t in zip(weights, trained, strict=True)]
    values = states.value, trained, frozen, targets.value, mask.value
    if jax.tree.leaves(trained):
        loss = _sum_loss(head, states.value, _either(trained, frozen), *values[3:])
        return loss, (values, None)
    (loss, _), gradient = _sum_gradients(head, *values)
    return loss, (None, (gradient, trained))


def _backward(head: Jaxpr, kept: Any, g: Array) -> tuple[Any, ...]:
    values, gradients = kept
    if gradients is None:
        (_, by_trained), by_states = _sum_gradients(head, *values)
        by_trained = jax.tree.map(lambda x, w: (g * x).astype(w.dtype), by_trained, values[1])
    else:
        by_states, by_trained = gradients
    return (g * by_states).astype(by_states.dtype), by_trained, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _either(some: list[Any], others: list[Any]) -> list[Any]:
    return [b if a is None else a for a, b in zip(some, others, strict=True)]


def _has_gradient(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def as_float32(tree: Any) -> Any:
    """Sums, moments and updates are kept in float32, whatever is trained."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
