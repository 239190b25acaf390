"""Cross-entropy over the trained tokens, without all logits at once."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

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

    The logits of `chunk` tokens exist at a time; the backward pass computes them again.  Tokens
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

    def parts(x: Array) -> Array:
        """(chunks, batch, positions, ...), what is trained on first."""
        x = x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
        x = jnp.pad(x, ((0, 0), (0, -seq % length), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, length, *x.shape[2:]).swapaxes(0, 1)

    def summed(states: Array, targets: Array, mask: Array) -> Array:
        logits = head(states.reshape(-1, width)).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(jnp.where(mask.reshape(-1), loss, 0.0))

    def skipped(*_: Array) -> Array:
        return jnp.zeros((), jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.lax.cond(jnp.any(part[2]), summed, skipped, *part), None

    chunks = (parts(hidden[:, :-1]), parts(input_ids[:, 1:]), parts(mask))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(mask)
