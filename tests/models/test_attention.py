"""Attention in parts against attention at once, and against JAX's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models._attention import attend

BATCH, SEQ, HEADS, KV_HEADS, D = 2, 11, 4, 2, 8


def draw(keys=SEQ, dtype=jnp.float32, seq=SEQ) -> Any:
    shapes = (BATCH, seq, HEADS, D), (BATCH, keys, KV_HEADS, D), (BATCH, keys, KV_HEADS, D)
    random = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s, dtype) for k, s in zip(random, shapes, strict=True)]


def packed(keys):
    """Two segments, each seen causally, the queries being the last of the keys."""
    rows, columns = np.arange(keys - SEQ, keys)[:, None], np.arange(keys)
    segments = np.arange(keys) // 6
    mask = (columns <= rows) & (segments == segments[keys - SEQ :, None])
    return jnp.broadcast_to(jnp.asarray(mask), (BATCH, 1, SEQ, keys))


def value_and_gradients(function: Any, arrays):
    def loss(arrays):
        out = function(*arrays)
        weights = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) / out.size
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return [out, *gradients]


def assert_close(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert np.linalg.norm(f - e) <= tolerance * np.linalg.norm(e)


@pytest.mark.parametrize("queries", [1, 4, 5, SEQ])
@pytest.mark.parametrize("keys", [SEQ, 15])
def test_parts_equal_jax(queries, keys):
    arrays, mask = draw(keys), packed(keys)
    bytes_of_parts = 4 * BATCH * HEADS * keys * queries
    found = value_and_gradients(lambda *x: attend(*x, mask, score_bytes=bytes_of_parts), arrays)
    expected = value_and_gradients(
        lambda *x: jax.nn.dot_product_attention(*x, mask=mask, implementation="xla"), arrays
    )
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(
    "seq, score_bytes, masked",
    [(64, 2**20, False), (131, 2**20, True), (131, 4 * BATCH * HEADS * 131 * 7, True)],
)
def test_stages_equal_jax(seq, score_bytes, masked):
    """Long sequences: the queries of a stage see the keys up to its end, and no query loses one."""
    arrays, segments = draw(seq, seq=seq), np.arange(seq) // 50
    same = jnp.asarray(np.tril(segments[:, None] == segments))
    mask = jnp.broadcast_to(same, (BATCH, 1, seq, seq)) if masked else None
    found = value_and_gradients(lambda *x: attend(*x, mask, score_bytes=score_bytes), arrays)
    expected = value_and_gradients(
        lambda *x: jax.nn.dot_product_attention(
            *x, mask=mask, is_causal=True, implementation="xla"
        ),
        arrays,
    )
    assert_close(found, expected, 2e-6)


def test_later_keys_are_not_multiplied():
    """A causal sequence's scores: five eighths of all."""
    q, k, v = (jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.float32) for _ in range(3))
    one_query = jax.ShapeDtypeStruct((1, 511, 1, 64), jnp.float32)

    def flops(*shapes):
        compiled: Any = jax.jit(attend).lower(*shapes).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(q, k, v) < 0.66 * flops(one_query, k, v) * 512 / 511


def test_no_mask_is_causal():
    arrays = draw()
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True, implementation="xla")
    for score_bytes in (1, 2**20):
        assert_close([attend(*arrays, score_bytes=score_bytes)], [expected], 1e-6)


def test_gradients_of_16_bits_are_summed_in_32():
    """However many parts, a key's gradient is rounded a few times, not once for each part."""
    wide = draw()
    arrays = [x.astype(jnp.bfloat16) for x in wide]
    exact = value_and_gradients(attend, [x.astype(jnp.float32) for x in arrays])
    found = value_and_gradients(lambda *x: attend(*x, score_bytes=1), arrays)
    assert_close(found, [x.astype(jnp.bfloat16) for x in exact], 1e-2)


def test_scores_do_not_exist_at_once():
    seq, heads = 512, 4
    x = jax.ShapeDtypeStruct((1, seq, heads, 8), jnp.float32)

    def temporaries(score_bytes):
        def loss(*arrays):
            return jnp.sum(attend(*arrays, score_bytes=score_bytes) ** 2)

        compiled: Any = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * heads * seq**2
    assert temporaries(scores) > scores
    assert temporaries(scores // 16) < 0.6 * scores


@pytest.mark.parametrize("score_bytes", [2**20, 4 * BATCH * HEADS * 64 * 7])
def test_capped_and_scaled_scores(score_bytes):
    """c·tanh(s/c), with its gradients, against the same in plain JAX."""
    arrays, scale, cap = draw(64, seq=64), 0.7, 1.5

    def plain(query, key, value):
        key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
        scores = cap * jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale / cap)
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((64, 64), bool)), scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    found = value_and_gradients(
        lambda *x: attend(*x, scale=scale, cap=cap, score_bytes=score_bytes), arrays
    )
    assert_close(found, value_and_gradients(plain, arrays), 1e-6)
