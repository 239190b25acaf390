"""The choice of cuDNN's attention, with JAX's own in its place: no GPU is at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import CausalLM, ModelConfig, _attention, _cudnn


def draw(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 8, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.fixture
def gpu(monkeypatch):
    """A process that believes it has a GPU, whose cuDNN is the function that is set here."""

    def use(attention):
        def fused(query, key, value, mask, by, scale=None):
            if scale is not None:  # queries carry what theirs would multiply scores by
                query = query * (scale * query.shape[-1] ** 0.5)
            function = attention if by == "cudnn" else by_xla
            return function(query, key, value, mask)

        monkeypatch.setattr(_cudnn, "_attention", fused)
        monkeypatch.setattr(_cudnn.jax, "default_backend", lambda: "gpu")

    _cudnn.why_not.cache_clear()
    yield use
    monkeypatch.undo()
    _cudnn.why_not.cache_clear()


def by_xla(query, key, value, mask):
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation="xla"
    )


def test_what_works_is_used(gpu):
    calls = []

    def attention(*arrays):
        calls.append(arrays[0].shape)
        return by_xla(*arrays)

    gpu(attention)
    assert _attention.attention_path(jnp.bfloat16, 2, 16) == "cudnn"
    arrays, tried = draw(), len(calls)
    found = jax.jit(lambda *x: _attention.attend(*x))(*arrays)
    assert calls[tried:] == [(2, 8, 4, 16)]
    expected = by_xla(*(x.astype(jnp.float32) for x in arrays), None)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)
    _attention.attend(*draw(jnp.float32))
    _attention.attend(arrays[0][:, :3], *arrays[1:])
    _attention.attend(*arrays, cap=5.0)
    assert len(calls) == tried + 1, "32 bits, a cache and capped scores go the other way"
    found = _attention.attend(*arrays, scale=0.1)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = by_xla(exact[0] * 0.1 * 16**0.5, *exact[1:], None)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


def test_it_is_tried_while_a_step_is_traced(gpu):
    gpu(by_xla)
    jax.jit(lambda *x: _attention.attend(*x))(*draw())
    assert _cudnn.why_not.cache_info().currsize == 1
    assert _cudnn.why_not("bfloat16", 2, 16) is None


def test_what_is_refused_falls_back(gpu):
    def attention(*_):
        raise RuntimeError("No execution plans support the graph.\nmore")

    gpu(attention)
    words = "xla: cuDNN refuses: No execution plans support the graph."
    assert _attention.attention_path(jnp.bfloat16, 2, 16) == words
    assert _attention.attend(*draw()).shape == (2, 8, 4, 16)


def test_what_is_wrong_falls_back(gpu):
    """A backend that ignores the mask, say."""
    gpu(lambda query, key, value, mask: by_xla(query, key, value, None))
    assert "xla: cuDNN's results were" in _attention.attention_path(jnp.bfloat16, 2, 16)


def test_without_a_gpu_the_reason_is_told():
    assert _attention.attention_path(jnp.bfloat16, 4, 128) == "xla: there is no GPU, but cpu"


def test_it_is_left_out_where_adapters_are_trained_together(gpu):
    asked = []

    def attention(*arrays):
        asked.append(arrays)
        return by_xla(*arrays)

    gpu(attention)
    query, key, value = (x[None] for x in draw())
    _attention.attend(query[0], key[0], value[0])
    asked.clear()
    jax.vmap(lambda *x: _attention.attend(*x, fused=False))(query, key, value)
    assert not asked
    config = ModelConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for fused in (True, False):
        asked.clear()
        model = CausalLM(config, dtype=jnp.bfloat16, fused_attention=fused)
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
        assert bool(asked) == fused
