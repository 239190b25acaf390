"""What a cache keeps: as much as it was given, or eight bits of it within a bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import InputError
from lora_jax.models import CausalLM, ModelConfig, generate, init_cache
from lora_jax.models._cache import by_layer, encode, read, write

IDS = jax.random.randint(jax.random.key(1), (2, 24), 0, 48)


@pytest.fixture(scope="module")
def run(config, params):
    """Logits of 24 tokens, 8 of them at once and the rest one by one over a cache."""
    model = CausalLM(config)

    @jax.jit
    def step(ids, cache):
        hidden, cache = model.apply({"params": params}, ids, cache=cache, method="hidden_states")
        return model.apply({"params": params}, hidden, method="logits"), cache

    def logits(dtype):
        parts = []
        cache = init_cache(config, 2, 24, dtype)
        for start, end in [(0, 8), *((i, i + 1) for i in range(8, 24))]:
            part, cache = step(IDS[:, start:end], cache)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    return logits


def test_logits_over_eight_bits_are_near(config, params, run):
    whole = jax.jit(CausalLM(config).apply)({"params": params}, IDS)
    exact, coded = run(jnp.float32), run("int8")
    largest = np.abs(whole).max()
    np.testing.assert_allclose(exact, whole, rtol=0, atol=1e-5 * largest)
    # Each key and value is off by 1/254 of its vector's largest entry at most.
    assert 1e-5 * largest < np.abs(coded - exact).max() < 0.02 * largest
    assert np.mean(coded.argmax(-1) == exact.argmax(-1)) > 0.9


def test_greedy_text_over_eight_bits(config, params):
    model, prompts = CausalLM(config), [[5, 6, 7, 8, 9], [20], [30, 31, 32]]
    exact = generate(model, params, prompts, max_new_tokens=12)
    coded = generate(model, params, prompts, max_new_tokens=12, cache_dtype="int8")
    assert np.mean(np.asarray(exact) == np.asarray(coded)) > 0.7
    assert exact == generate(model, params, prompts, max_new_tokens=12, cache_dtype="float32")


def test_eight_bits_take_half_of_sixteen():
    config = ModelConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=64, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip

    def kept(dtype):
        shapes = jax.eval_shape(lambda: init_cache(config, 8, 4096, dtype))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes.key, shapes.value)))

    assert kept("bfloat16") == 2 * 32 * 8 * 4096 * 8 * 128 * 2
    assert kept("int8") / kept("bfloat16") == 0.5 + 4 / (2 * 128)  # a float32 for 128 codes


@settings(max_examples=30)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.floats(1e-6, 1e6))
def test_coding_is_within_its_bound(entries, scale):
    x = np.asarray(entries, np.float32) * np.float32(scale)
    coded = encode(jnp.asarray(x))
    off = np.abs(np.asarray(coded.codes, np.float32) * np.asarray(coded.scale) - x)
    flushed = 127 * np.finfo(np.float32).tiny  # a smaller scale is zero on many processors
    assert np.all(off <= np.abs(x).max() / 254 * (1 + 1e-5) + flushed)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_by_layer_holds_the_same(config, dtype, turned):
    new = jax.random.normal(jax.random.key(0), (2, 3, 2, 16))
    cache, how = init_cache(config, 2, 8, dtype), {"turned": turned}

    def written(cache):
        kept = cache.key if turned else cache.value
        return write(write(kept, new, 1, 2, **how), -new, 0, 5, **how)

    stacked, split = written(cache), written(by_layer(cache))
    for layer in range(2):
        found = read(split, layer, jnp.float32, **how)
        np.testing.assert_array_equal(found, read(stacked, layer, jnp.float32, **how))
        assert found.shape == (2, 2, 8, 16)
    near = read(stacked, 1, jnp.float32, **how)[:, :, 2:5].transpose(0, 2, 1, 3)
    np.testing.assert_allclose(near, new, rtol=0, atol=4 / 254 if dtype == "int8" else 0)


def test_an_unknown_type_is_refused(config, params):
    with pytest.raises(InputError, match=r"cache_dtype: unknown 'int9' \(did you mean 'int8'\?\)"):
        generate(CausalLM(config), params, [[1]], max_new_tokens=1, cache_dtype="int9")
