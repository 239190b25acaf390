"""Causal attention that keeps no scores, and computes few of those that nobody sees."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from .._mesh_axes import OPEN, cut, mesh_size
from .._typing import Array
from ._cudnn import fused_attend, why_not

NAME = "attention"
"""What `checkpoint_name` calls the output and the log-sum-exp of the scores."""
SCORE_BYTES = 64 * 2**20
"""Float32 scores that exist at one time; few enough, and attention is one plain product."""
STAGES = 4
"""Stages into which a causal sequence's queries are cut, each with the keys up to its own end:
5/8 of the work of all pairs, where twice as many stages would still do 9/16."""
_SHORTEST_STAGE = 32
_LOW = 1e30


def attend(
    query: Float[Array, "batch seq heads d"],
    key: Float[Array, "batch keys kv_heads d"],
    value: Float[Array, "batch keys kv_heads d"],
    mask: Bool[Array, "batch 1 seq keys"] | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    score_bytes: int = SCORE_BYTES,
    fused: bool = True,
) -> Float[Array, "batch seq heads d"]:
    """softmax(scale·q·kᵀ over what is seen)·v, grouped heads sharing keys and values.

    Scores are float32 and live in one pass only: the backward pass computes them again from what
    it keeps, which is the arguments, the output and each query's log-sum-exp. Reverse mode only.
    On a GPU cuDNN does it in 16 bits, if it works there (`attention_path`) and there are as many
    keys as queries.

    Args:
        query, key, value: Of one type; heads are a multiple of kv_heads.
        mask: True where a query sees a key; None is plain causal. Every query must see a key,
            and with as many keys as queries none after its own position.
        scale: Of the scores; 1/√d by default.
        cap: c of c·tanh(score / c), which keeps scores within ±c; none by default.
        score_bytes: Bytes of scores at one time (at least one query of each row and head);
            queries take turns where there would be more.
        fused: Whether cuDNN may do it; under `jax.vmap` it cannot, since the rule that JAX has
            for it fails for masks of one head.

    Returns:
        Outputs in the type of the query.

    Example:
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> bool(jnp.allclose(attend(x, x, x), 1.0))
        True

    Source: Vaswani et al. 2017, equation 1; Dao et al. 2022, "FlashAttention", algorithms 1 and 4;
    Rabe & Staats 2021, "Self-attention does not need O(n²) memory".
    """
    batch, seq, heads, d = query.shape
    keys, kv_heads = key.shape[1:3]
    how = _how(d, scale, cap, score_bytes)
    parts = mesh_size("sequence") if seq == keys else 1
    fused = fused and seq == keys and seq > 1 and parts == 1
    if fused and attention_path(query.dtype, heads // kv_heads, d, cap) == "cudnn":
        return checkpoint_name(fused_attend(query, key, value, mask, how.scale), NAME)
    seen: Array = jnp.tril(jnp.ones((1, 1, seq, keys), bool)) if mask is None else mask
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, d)
    by_head = (
        grouped.transpose(0, 2, 3, 1, 4),
        key.transpose(0, 2, 1, 3),
        value.transpose(0, 2, 1, 3),
    )
    if parts > 1:
        out = _attend_in_parts(how, parts, *by_head, seen[:, :, None])
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, d)
    # XLA on CPUs multiplies twice as fast what lies head by head in memory.
    by_head = jax.lax.optimization_barrier(by_head)
    out = jax.lax.optimization_barrier(_attend(how, *by_head, seen[:, :, None]))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, d)


def attend_cached(
    query: Float[Array, "batch seq heads d"],
    key: Float[Array, "batch kv_heads keys d"],
    value: Float[Array, "batch kv_heads keys d"],
    mask: Bool[Array, "batch 1 seq keys"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Float[Array, "batch seq heads d"]:
    """`attend` over keys and values that lie head by head already, as a cache keeps them.

    Example:
        >>> x, kept = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 2, 4, 8))
        >>> bool(jnp.allclose(attend_cached(x, kept, kept, jnp.ones((1, 1, 1, 4), bool)), 1.0))
        True
    """
    batch, seq, heads, d = query.shape
    # Queries may stand anywhere among the keys, were there as many of them.
    how = dataclasses.replace(_how(d, scale, cap, score_bytes), stages=1)
    grouped = query.reshape(batch, seq, key.shape[1], -1, d).transpose(0, 2, 3, 1, 4)
    out: Array = _attend(how, grouped, key, value, mask[:, :, None])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, d)


def _attend_in_parts(
    how: "_How", parts: int, query: Array, key: Array, value: Array, mask: Array
) -> Array:
    """`_attend` where devices hold parts of the tokens: each its queries, and all keys."""
    key, value = (cut(x, ("data", "fsdp"), OPEN, None, None) for x in (key, value))

    def split(x: Array) -> Array:
        """(parts, ..., seq / parts, last)."""
        x = x.reshape(*x.shape[:-2], parts, -1, x.shape[-1])
        return cut(jnp.moveaxis(x, -3, 0), "sequence", *[OPEN] * (x.ndim - 1))

    attend = jax.vmap(functools.partial(_attend, how), in_axes=(0, None, None, 0))
    out = jnp.moveaxis(attend(split(query), key, value, split(mask)), 0, -3)
    return out.reshape(query.shape)


def attention_path(dtype: Any, group: int, d: int, cap: float | None = None) -> str:
    """How `attend` computes here: `cudnn`, or `xla` and why; tried once in a process.

    Args:
        dtype: Type of the activations.
        group: Query heads that share a key.
        d: Width of a head.
        cap: Of the scores, which cuDNN does not know.

    Example:
        >>> attention_path(jnp.float32, 4, 128)
        'xla: float32 has more than 16 bits'
    """
    refusal = why_not(jnp.dtype(dtype).name, group, d) if cap is None else "scores are capped"
    return "cudnn" if refusal is None else f"xla: {refusal}"


@dataclasses.dataclass(frozen=True)
class _How:
    """What is known while tracing: how scores are made, how many at one time, in which stages."""

    scale: float
    cap: float | None
    score_bytes: int
    stages: int = STAGES

    def scores(self, query: Array, key: Array) -> Array:
        scores = _product("bkgqd,bksd->bkgqs", query, key) * self.scale
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def backward(self, d_scores: Array, scores: Array) -> Array:
        """The gradient by the product of query and key."""
        if self.cap is not None:
            d_scores = d_scores * (1 - jnp.square(scores / self.cap))
        return d_scores * self.scale


def _how(d: int, scale: float | None, cap: float | None, score_bytes: int) -> _How:
    """`score_bytes` are a device's, and shapes those of all."""
    devices = mesh_size("data", "fsdp", "tensor")
    return _How(d**-0.5 if scale is None else scale, cap, score_bytes * devices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: _How,
    query: Float[Array, "batch kv_heads group seq d"],
    key: Float[Array, "batch kv_heads keys d"],
    value: Float[Array, "batch kv_heads keys d"],
    mask: Bool[Array, "batch_or_1 1 1 seq keys"],
) -> Float[Array, "batch kv_heads group seq d"]:
    return _forward(how, query, key, value, mask)[0]


def _forward(how: _How, query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, Any]:
    query, seen = _together(query, mask)
    outs, sums = [], []
    for queries, keys, parts in _stages(query.shape, key.shape[2], how):
        k, v = key[:, :, keys], value[:, :, keys]

        def part(_: None, xs: tuple[Array, Array], k: Array = k, v: Array = v) -> Any:
            scores = _hidden(how.scores(xs[0], k), xs[1])
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("bkgqs,bksd->bkgqd", weights.astype(v.dtype), v) / total
            return None, (out.astype(query.dtype), top + jnp.log(total))

        cut = query[..., queries, :], seen[..., queries, keys]
        _, (out, lse) = _in_parts(part, None, cut, parts)
        outs.append(out)
        sums.append(lse)
    out = checkpoint_name(jnp.concatenate(outs, axis=3), NAME)
    lse = checkpoint_name(jnp.concatenate(sums, axis=3), NAME)
    return out, (query, key, value, mask, out, lse)


def _backward(how: _How, residuals: Any, gradient: Any) -> tuple[Any, ...]:
    query, key, value, mask, out, lse = residuals
    gradient, seen = _together(jnp.asarray(gradient), mask)
    mean = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
    # A key's gradient is a sum over the queries' parts: in 32 bits, whatever the type.
    d_key, d_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    d_query = []
    for queries, keys, parts in _stages(query.shape, key.shape[2], how):
        k, v = key[:, :, keys], value[:, :, keys]

        def part(sums: tuple[Array, Array], xs: Any, k: Array = k, v: Array = v) -> Any:
            q, shown, g, of_lse, of_mean = xs
            scores = how.scores(q, k)
            weights = jnp.exp(_hidden(scores, shown) - of_lse)
            d_weights = _product("bkgqd,bksd->bkgqs", g, v)
            d_scores = how.backward(weights * (d_weights - of_mean), scores).astype(q.dtype)
            dk = _product("bkgqs,bkgqd->bksd", d_scores, q)
            dv = _product("bkgqs,bkgqd->bksd", weights.astype(g.dtype), g)
            dq = _product("bkgqs,bksd->bkgqd", d_scores, k).astype(q.dtype)
            return (sums[0] + dk, sums[1] + dv), dq

        cut = [x[..., queries, :] for x in (query, gradient, lse, mean)]
        xs = (cut[0], seen[..., queries, keys], *cut[1:])
        sums, dq = _in_parts(part, (d_key[:, :, keys], d_value[:, :, keys]), xs, parts)
        d_key, d_value = d_key.at[:, :, keys].set(sums[0]), d_value.at[:, :, keys].set(sums[1])
        d_query.append(dq)
    dq = jnp.concatenate(d_query, axis=3)
    return dq, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _together(x: Array, mask: Array) -> tuple[Array, Array]:
    """Let the mask seem to depend on a layer's own array.

    What depends on constants alone JAX computes before a scan over layers, and keeps: the mask
    spread over heads is as large as the scores.
    """
    return jax.lax.optimization_barrier((x, mask))


def _stages(shape: tuple[int, ...], keys: int, how: _How) -> Iterator[tuple[slice, slice, int]]:
    """Queries, the keys that they may see, and the parts in which their scores are few enough."""
    batch, kv_heads, group, seq, _ = shape
    count = max(min(how.stages, seq // _SHORTEST_STAGE), 1) if seq == keys else 1
    for stage in range(count):
        start, end = (seq * at // count for at in (stage, stage + 1))
        visible = keys * (stage + 1) // count
        length = max(how.score_bytes // (4 * batch * kv_heads * group * visible), 1)
        yield slice(start, end), slice(0, visible), -(-(end - start) // length)


def _in_parts(part: Any, carry: Any, xs: Any, parts: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over parts of the queries, the last axis but one; at once if there is one.

    The last part is filled up with zeros; a query that sees nothing has no gradient to give.
    """
    if parts == 1:
        return part(carry, xs)
    seq = jax.tree.leaves(xs)[0].shape[-2]
    length = -(-seq // parts)

    def cut(x: Array) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[-2] = (0, parts * length - seq)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], parts, length, x.shape[-1]), -3, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], parts * length, x.shape[-1])[..., :seq, :]

    carry, out = jax.lax.scan(part, carry, jax.tree.map(cut, xs))
    return carry, jax.tree.map(join, out)


def _hidden(scores: Array, mask: Array) -> Array:
    # Sums and products with a scalar rather than a select, whose constant would be as large as
    # the scores. A hidden score is so low that the true one vanishes beside it.
    return scores + (mask.astype(jnp.float32) - 1) * _LOW


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
