"""Cross-entropy over the trained tokens, without all logits at once."""

import functools
from collections.abc import Callable
from typing import Any

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

    The logits of `chunk` tokens exist at a time; the backward pass computes them again.

    Args:
        head: From hidden states (tokens, d) to logits (tokens, vocab).
        hidden: Last hidden states.
        input_ids: Token ids; position t is predicted from the hidden state at t - 1.
        loss_mask: True where a token counts as a target.
        chunk: Tokens per chunk.

    Returns:
        (loss summed in nats, number of trained tokens).

    Example:
        >>> ids = jnp.array([[0, 1, 1]])
        >>> loss, count = next_token_loss(lambda h: h, jnp.zeros((1, 3, 4)), ids, ids == 1)
        >>> round(float(loss / count), 4), int(count)     # log 4
        (1.3863, 2)
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets, mask = input_ids[:, 1:].reshape(-1), loss_mask[:, 1:].reshape(-1)
    chunk = min(chunk, len(targets))
    padding = -len(targets) % chunk
    states = jnp.pad(states, ((0, padding), (0, 0)))
    targets, mask = jnp.pad(targets, (0, padding)), jnp.pad(mask, (0, padding))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total: Array, part: Any) -> tuple[Array, None]:
        states, targets, mask = part
        logits = head(states).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(jnp.where(mask, loss, 0.0)), None

    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (states, targets, mask))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)
    return total, jnp.sum(mask)
