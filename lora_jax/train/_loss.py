"""Cross-entropy over the trained tokens, without all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from .._typing import Array

Head = Callable[..., Array]
"""From states (tokens, d) and its weights to logits (tokens, vocab)."""


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
    while they do, so that they are computed once; a trained head computes them again.  Tokens
    that are not trained on come last, and chunks of nothing else are skipped: where a tenth of
    the tokens are answers, nine tenths of the head's work are saved.

    Args:
        head: From hidden states (tokens, d) to logits (tokens, vocab).
        hidden: Last hidden states.
        input_ids: Token ids; position t is predicted from the hidden state at t - 1.
        loss_mask: True where a token counts as a target.
        chunk: Tokens per chunk (at least one of each row).

    Returns:
        (loss summed in nats, number of trained tokens).

    Example:
        >>> ids = jnp.array([[0, 1, 1]])
        >>> loss, count = next_token_loss(lambda h: h, jnp.zeros((1, 3, 4)), ids, ids == 1)
        >>> round(float(loss / count), 4), int(count)     # log 4
        (1.3863, 2)
    """
    batch, seq, width = hidden.shape[0], hidden.shape[1] - 1, hidden.shape[2]
    length = min(max(chunk // batch, 1), seq)
    mask = loss_mask[:, 1:]
    # Within each row, so that rows may lie on different devices.
    order = jnp.argsort(~mask, axis=1, stable=True)
    rows = jnp.arange(batch)[:, None]

    def chunks(x: Array) -> Array:
        """(chunks, batch, positions, ...), what is trained on first."""
        x = x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
        x = jnp.pad(x, ((0, 0), (0, -seq % length), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, length, *x.shape[2:]).swapaxes(0, 1)

    # What a trained head closes over becomes an argument, which has a gradient.
    example = jax.ShapeDtypeStruct((batch * length, width), hidden.dtype)
    head, weights = jax.closure_convert(head, example)
    states, targets, ours = chunks(hidden[:, :-1]), chunks(input_ids[:, 1:]), chunks(mask)
    return _loss(head, states, weights, targets, ours), jnp.sum(mask)


def _chunk_loss(head: Head, states: Array, weights: Any, targets: Array, mask: Array) -> Array:
    logits = head(states.reshape(-1, states.shape[-1]), *weights).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(mask.reshape(-1), loss, 0.0))


def _sum_loss(head: Head, states: Array, weights: Any, targets: Array, mask: Array) -> Array:
    """The loss of all chunks; its backward pass computes the logits again."""

    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: Array, part: Any) -> tuple[Array, None]:
        states, targets, mask = part

        def loss() -> Array:
            return _chunk_loss(head, states, weights, targets, mask)

        return total + jax.lax.cond(jnp.any(mask), loss, lambda: jnp.zeros((), jnp.float32)), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (states, targets, mask))[0]


def _sum_loss_and_gradient(
    head: Head, states: Array, weights: Any, targets: Array, mask: Array
) -> tuple[Array, Array]:
    """The loss of all chunks and its gradient by the states, from the same logits."""

    def add(total: Array, part: Any) -> tuple[Array, Array]:
        states, targets, mask = part

        def both() -> tuple[Array, Array]:
            return jax.value_and_grad(partial(_chunk_loss, head))(states, weights, targets, mask)

        def nothing() -> tuple[Array, Array]:
            return jnp.zeros((), jnp.float32), jnp.zeros_like(states)

        loss, gradient = jax.lax.cond(jnp.any(mask), both, nothing)
        return total + loss, gradient

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (states, targets, mask))


_loss = jax.custom_vjp(_sum_loss, nondiff_argnums=(0,))


def _forward(head: Head, states: Any, weights: Any, targets: Any, mask: Any) -> tuple[Array, Any]:
    is_trained = any(weight.perturbed for weight in weights)
    values = states.value, [w.value for w in weights], targets.value, mask.value
    if is_trained:
        return _sum_loss(head, *values), (values, None)
    loss, gradient = _sum_loss_and_gradient(head, *values)
    return loss, (None, gradient)


def _backward(head: Head, kept: Any, g: Array) -> tuple[Any, ...]:
    values, gradient = kept
    if values is None:
        return (g * gradient).astype(gradient.dtype), None, None, None
    states, weights, targets, mask = values
    _, pull = jax.vjp(lambda s, w: _sum_loss(head, s, w, targets, mask), states, weights)
    return (*pull(g), None, None)


_loss.defvjp(_forward, _backward, symbolic_zeros=True)
