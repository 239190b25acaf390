"""The loss against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from lora_jax.train import next_token_loss

BATCH, SEQ, WIDTH, VOCAB = 3, 9, 8, 17


def draw(seed: int):
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)
    head = 3 * generator.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    ids = generator.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)
    mask = generator.random((BATCH, SEQ)) < 0.4
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(ids), jnp.asarray(mask)


def reference(hidden, head, ids, mask):
    """-log p of every trained token, one after the other."""
    hidden, head, ids, mask = (np.asarray(x) for x in (hidden, head, ids, mask))
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        if t:
            logits = hidden[b, t - 1].astype(np.float64) @ head.astype(np.float64)
            shifted = logits - logits.max()
            total += np.log(np.exp(shifted).sum()) - shifted[ids[b, t]]
    return total, int(mask[:, 1:].sum())


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), chunk=st.sampled_from([1, 5, 24, 4096]))
def test_equals_numpy(seed, chunk):
    hidden, head, ids, mask = draw(seed)
    loss, count = next_token_loss(lambda h: h @ head, hidden, ids, mask, chunk=chunk)
    expected, expected_count = reference(hidden, head, ids, mask)
    np.testing.assert_allclose(float(loss), expected, rtol=2e-6)
    assert int(count) == expected_count


@pytest.mark.parametrize("chunk", [5, 4096])
def test_gradient_equals_plain_autodiff(chunk):
    hidden, head, ids, mask = draw(0)

    def chunked(hidden, head):
        return next_token_loss(lambda h: h @ head, hidden, ids, mask, chunk=chunk)[0]

    def plain(hidden, head):
        logs = jax.nn.log_softmax(hidden[:, :-1] @ head)
        picked = jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask[:, 1:])

    found = jax.grad(chunked, argnums=(0, 1))(hidden, head)
    expected = jax.jit(jax.grad(plain, argnums=(0, 1)))(hidden, head)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


def test_untrained_targets_do_not_matter():
    hidden, head, ids, mask = draw(1)
    changed = jnp.where(mask, ids, (ids + 1) % VOCAB)

    @jax.jit
    def value_and_grad(ids):
        return jax.value_and_grad(
            lambda h: next_token_loss(lambda x: x @ head, h, ids, mask, chunk=7)[0]
        )(hidden)

    for one, other in zip(value_and_grad(ids), value_and_grad(changed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_trained_is_zero_of_zero():
    hidden, head, ids, _ = draw(2)
    loss, count = next_token_loss(lambda h: h @ head, hidden, ids, jnp.zeros_like(ids, bool))
    assert (float(loss), int(count)) == (0.0, 0)


def test_chunks_without_a_trained_token_are_skipped():
    hidden, head, ids, _ = draw(3)
    mask = jnp.zeros((BATCH, SEQ), bool).at[0, 2].set(True).at[1, jnp.array([1, 5, 8])].set(True)
    computed = []

    def watched(states):
        jax.debug.callback(lambda: computed.append(len(states)))
        return states @ head

    for chunk, expected in ((3, [3, 3, 3]), (6, [6, 6]), (4096, [BATCH * SEQ])):
        computed.clear()
        loss, _ = next_token_loss(watched, hidden, ids, mask, chunk=chunk)
        jax.effects_barrier()
        assert computed == expected
        np.testing.assert_allclose(float(loss), reference(hidden, head, ids, mask)[0], rtol=2e-6)


def products(jaxpr) -> int:
    """How many matrix products a jaxpr holds, inner ones included."""
    inner = [j for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(map(products, inner))


def test_a_frozen_head_computes_its_logits_once():
    hidden, head, ids, mask = draw(4)

    def loss(hidden, head):
        return next_token_loss(lambda h: h @ head, hidden, ids, mask, chunk=6)[0]

    forward_only = jax.make_jaxpr(loss)(hidden, head)
    frozen = jax.make_jaxpr(jax.grad(loss))(hidden, head)
    trained = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head)
    # The logits; the logits and the states' gradient; both again, and the head's gradient.
    counts = [products(x.jaxpr) for x in (forward_only, frozen, trained)]
    assert counts[0] == 1 and counts[1] == 2 and counts[2] >= 4


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_gradient_of_half_precision_states(argnums):
    hidden, head, ids, mask = draw(5)

    def loss(hidden, head):
        return next_token_loss(lambda h: h @ head, hidden, ids, mask, chunk=6)[0]

    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(loss, argnums))
    found = jax.tree.leaves(gradient(*half))
    exact = jax.tree.leaves(gradient(*(x.astype(jnp.float32) for x in half)))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(one), other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize("argnums", [0, (0, 1)])
@pytest.mark.parametrize(
    "around",
    [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (0, None))],
    ids=["jit", "remat", "vmap"],
)
def test_whatever_stands_around_the_loss(around, argnums):
    """A head that closes over integers too, as one of quantized weights or with dropout does."""
    hidden, head, ids, mask = draw(6)
    codes, key = jnp.arange(WIDTH, dtype=jnp.uint8), jax.random.key(0)

    def loss(hidden, head, codes, key):
        keep = jax.random.bernoulli(key, 0.8, (WIDTH, 1)) * codes[:, None]
        return next_token_loss(lambda h: h @ (head * keep), hidden, ids, mask, chunk=6)[0]

    def wrapped(hidden, head):
        if around is jax.jit or around is jax.checkpoint:
            return around(loss)(hidden, head, codes, key)
        return around(lambda h, w: loss(h, w, codes, key))(hidden[None], head)[0]

    plain = jax.jit(jax.grad(loss, argnums))(hidden, head, codes, key)
    found = jax.jit(jax.grad(wrapped, argnums))(hidden, head)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_a_trained_head_is_not_copied_for_each_chunk():
    width, vocab = 32, 4096
    hidden, head = jnp.ones((2, 65, width)), jnp.ones((width, vocab))
    ids = jnp.zeros((2, 65), jnp.int32)

    def loss(head):
        return next_token_loss(lambda h: h @ head, hidden, ids, ids == 0, chunk=16)[0]

    compiled = jax.jit(jax.grad(loss)).lower(head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * head.nbytes
