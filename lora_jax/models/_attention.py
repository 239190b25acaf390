"""Causal attention that never holds all scores: a part of the queries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from .._typing import Array

SCORE_BYTES = 64 * 2**20
"""Float32 scores that exist at one time; few enough, and attention is one plain product."""
_HIDDEN = 1e30


def attend(
    query: Float[Array, "batch seq heads d"],
    key: Float[Array, "batch keys kv_heads d"],
    value: Float[Array, "batch keys kv_heads d"],
    mask: Bool[Array, "batch 1 seq keys"] | None = None,
    *,
    score_bytes: int = SCORE_BYTES,
) -> Float[Array, "batch seq heads d"]:
    """softmax(q·kᵀ/√d over what the mask shows)·v, grouped heads sharing keys and values.

    Scores are float32. Where those of all queries exceed `score_bytes`, queries take turns and
    the backward pass computes each part's scores again.

    Args:
        query, key, value: Of one type; heads are a multiple of kv_heads.
        mask: True where a query sees a key; None is plain causal. Every query must see a key.
        score_bytes: Bytes of scores at one time (at least one query of each row and head).

    Returns:
        Outputs in the type of the query.

    Example:
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> bool(jnp.allclose(attend(x, x, x), 1.0))
        True

    Source: Vaswani et al. 2017, equation 1; Rabe & Staats 2021, "Self-attention does not need
    O(n²) memory".
    """
    batch, seq, heads, d = query.shape
    keys, kv_heads = key.shape[1:3]
    seen: Array = jnp.tril(jnp.ones((1, 1, seq, keys), bool)) if mask is None else mask
    # What depends on constants alone JAX computes before a scan over layers, and keeps: the mask
    # spread over heads is as large as the scores. It must seem to depend on the layer's input.
    query, seen = jax.lax.optimization_barrier((query, seen))
    query = query.reshape(batch, seq, kv_heads, heads // kv_heads, d)
    length = min(max(score_bytes // (4 * batch * heads * keys), 1), seq)
    if length == seq:
        return _attend(query, key, value, seen).reshape(batch, seq, heads, d)
    parts = -(-seq // length)
    queries = _parts(query, 1, parts, length)
    masks = _parts(seen, 2, parts, length)
    # Their gradients are sums over the parts, in the type that they have out here.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def part(query: Array, mask: Array, wide: tuple[Array, Array]) -> Array:
        return _attend(query, wide[0].astype(key.dtype), wide[1].astype(value.dtype), mask)

    out = jax.lax.map(lambda xs: part(*xs, wide), (queries, masks))
    return jnp.moveaxis(out, 0, 1).reshape(batch, parts * length, heads, d)[:, :seq]


def _attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key, preferred_element_type=jnp.float32)
    # Sums and products with a scalar rather than a select, whose constant would be as large as
    # the scores. A hidden score is so low that the true one vanishes beside it.
    scores = scores * query.shape[-1] ** -0.5 + (mask[:, :, None].astype(jnp.float32) - 1) * _HIDDEN
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value)


def _parts(x: Array, axis: int, parts: int, length: int) -> Array:
    """Cut an axis into parts, the last one padded with zeros, and put them first."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, parts * length - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, length, *x.shape[axis + 1 :]), axis, 0)
