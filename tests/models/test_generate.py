"""Generation: a batch equals its rows, sampling keeps its promises, calls share a program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_jax import (
    KernelLayout,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
)
from lora_jax._errors import InputError
from lora_jax.models import CausalLM, generate, quantize_params
from lora_jax.models._decoding import _first
from lora_jax.models._sampling import draw, truncate

PROMPTS = [[5, 6, 7, 8, 9], [20], [30, 31, 32]]


@pytest.fixture(scope="module")
def model(config):
    return CausalLM(config)


def by_hand(model, params, prompt, count):
    """Greedy without cache or padding to the left: the whole text anew for each token."""

    @jax.jit
    def next_token(ids, length):
        return jnp.argmax(model.apply({"params": params}, ids)[0, length - 1])

    ids = np.zeros((1, len(prompt) + count), np.int32)
    ids[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + count):
        ids[0, length] = next_token(ids, length)
    return ids[0, len(prompt) :].tolist()


def test_greedy_batch_equals_the_uncached_rows(model, params):
    got = generate(model, params, PROMPTS, max_new_tokens=12, pad_id=7)
    assert got == [by_hand(model, params, prompt, 12) for prompt in PROMPTS]


def test_text_ends_with_its_eos(model, params):
    free = generate(model, params, PROMPTS, max_new_tokens=12)
    eos = free[0][4]
    for text, whole in zip(
        generate(model, params, PROMPTS, max_new_tokens=12, eos_ids=[eos, 47]), free, strict=True
    ):
        ends = [i + 1 for i, token in enumerate(whole) if token in (eos, 47)]
        assert text == whole[: ends[0] if ends else None]


@pytest.fixture(scope="module")
def compilations():
    """A growing list with an entry for everything that XLA compiles."""
    seen = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


def test_a_whole_session_takes_five_programs(config, params, compilations):
    fresh = dataclasses.replace(config, rms_norm_eps=2e-6)
    _first.clear_cache()
    before = len(compilations)
    for i, (length, new) in enumerate([(3, 9), (14, 16), (16, 2), (7, 40)]):
        rows = [[1] * length, [2], [3] * (length // 2 + 1), [4]][: 4 - i % 2]
        options = dict(max_new_tokens=new, eos_ids=range(length % 5))
        generate(CausalLM(fresh), params, rows, **options)
        warm = dict(temperature=[0.5 + i, 1.0, 0.0, 0.2][: len(rows)], seed=i)
        generate(CausalLM(fresh), params, rows, **warm, **options)
        narrow = dict(
            top_k=i, top_p=1 - i / 8, min_p=i / 8, temperature=1.0 + i, seed=[i] * len(rows)
        )
        generate(CausalLM(fresh), params, rows, **narrow, **options)
    assert len(compilations) - before == 5  # a prefill, two first tokens, two loops
    for i in range(2):
        penalties = dict(repetition_penalty=2 - i, presence_penalty=i, frequency_penalty=0.1)
        generate(CausalLM(fresh), params, PROMPTS, max_new_tokens=9, **penalties)
    assert len(compilations) - before == 7


def test_sampling_depends_on_the_key_alone(model, params):
    def sample(seed, prompts=PROMPTS):
        options = dict(temperature=1.0, key=jax.random.key(seed), max_new_tokens=12)
        return generate(model, params, prompts, **options)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    # A row's text does not depend on the rows after it.
    assert sample(0)[:1] == sample(0, PROMPTS[:1])


def test_a_row_with_a_seed_of_its_own_depends_on_nothing_else(model, params):
    def sample(prompts, seeds):
        return generate(model, params, prompts, max_new_tokens=12, temperature=1.5, seed=seeds)

    together = sample(PROMPTS, [7, 8, 2**40])
    assert sample(PROMPTS[::-1], [2**40, 8, 7]) == together[::-1]
    assert sample(PROMPTS[1:], [8, 2**40]) == together[1:]
    same = sample([PROMPTS[0]] * 3, 5)
    assert len({tuple(row) for row in same}) == 3
    assert sample([PROMPTS[0]] * 2, [5, 5 + 2**32])[0] != sample([PROMPTS[0]], [5 + 2**32])[0]


def test_rows_choose_in_their_own_ways(model, params):
    greedy = generate(model, params, PROMPTS, max_new_tokens=12)
    options = dict(max_new_tokens=[12, 3, 12], temperature=[0.0, 1.5, 1.5], seed=[0, 1, 2])
    mixed = generate(model, params, PROMPTS, top_k=[0, 0, 1], **options)
    assert (mixed[0], mixed[2]) == (greedy[0], greedy[2])
    assert len(mixed[1]) == 3 and mixed[1] != greedy[1][:3]


def test_penalties_forbid_what_they_are_about(model, params):
    def rows(**penalty):
        return generate(model, params, PROMPTS, max_new_tokens=12, **penalty)

    for text in rows(presence_penalty=1e6):
        assert len(set(text)) == 12
    for prompt, text in zip(PROMPTS, rows(repetition_penalty=1e6), strict=True):
        # Positive logits shrink to nothing: whatever has been said comes after all that has not.
        assert not set(prompt) & set(text)
    often = rows(frequency_penalty=[-1e6, 0, 0])
    assert len(set(often[0])) == 1 and often[1:] == rows()[1:]


def test_draws_follow_the_probabilities():
    scores = np.random.default_rng(0).normal(0, 2, 700).astype(np.float32)
    scores[::3] = -np.inf
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count // 100)
    run = jax.jit(lambda key: draw(jax.random.split(key, 100), jnp.tile(scores, (100, 1))))
    drawn = np.concatenate([run(key) for key in keys])
    share = np.exp(scores.astype(np.float64) - scores.max())
    share /= share.sum()
    found = np.bincount(drawn, minlength=len(scores))
    assert not found[::3].any()
    # Five standard deviations of each count, and of their squares' sum.
    assert np.all(np.abs(found - count * share) < 5 * np.sqrt(count * share) + 5)
    kept = count * share > 5
    squares = ((found - count * share)[kept] ** 2 / (count * share)[kept]).sum()
    assert abs(squares - kept.sum()) < 5 * np.sqrt(2 * kept.sum())


def test_an_adapted_quantized_base_generates_like_the_merged_one(model, params):
    base = quantize_params(params, QuantConfig(block_size=32))
    config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    layouts = {"model/layers": KernelLayout(stack="model/layers")}
    adapter = init_adapter(jax.random.key(3), base, config, layouts=layouts)
    merged = merge_adapter(base, adapter, layouts=layouts, dtype=jnp.float32)
    got = generate(lora_linen(model), combine(base, adapter), PROMPTS, max_new_tokens=12)
    assert got == generate(model, merged, PROMPTS, max_new_tokens=12)
    assert got != generate(model, params, PROMPTS, max_new_tokens=12)


def test_sampling_narrowed_to_one_token_is_greedy(model, params):
    greedy = generate(model, params, PROMPTS, max_new_tokens=12)
    options = dict(temperature=1.5, key=jax.random.key(0), max_new_tokens=12)
    assert generate(model, params, PROMPTS, top_k=1, **options) == greedy
    assert generate(model, params, PROMPTS, top_p=1e-6, **options) == greedy


jitted_truncate = jax.jit(truncate)


@settings(max_examples=20)
@given(
    # XLA takes numbers too small for their exponent for zero, so they tie.
    logits=st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=12, max_size=12),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
)
@example(logits=[0.0] * 11 + [-0.0], top_k=1, top_p=1.0)
def test_truncation_keeps_the_fewest_that_reach_top_p(logits, top_k, top_p):
    ranked = np.sort(np.array(logits, np.float32))[::-1]
    row = [np.array([value]) for value in (top_k, np.float32(top_p), np.float32(0))]
    kept = np.isfinite(np.asarray(jitted_truncate(ranked[None], *row))[0])
    count = kept.sum()
    assert kept[:count].all() and count >= 1
    # Those that tie with the last one stay with it.
    among = int((ranked >= ranked[(top_k or 12) - 1]).sum())
    allowed = np.exp(ranked.astype(np.float64))[:among]
    share = np.cumsum(allowed / allowed.sum())
    fewer = int((ranked > ranked[count - 1]).sum())
    # The next smaller set would not reach top_p; this one does, or top_k stopped it.
    assert count <= among and (fewer == 0 or share[fewer - 1] < top_p + 1e-5)
    assert share[count - 1] >= top_p - 1e-5


def test_adapted_model_generates_like_the_merged_one(model, params):
    config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    layouts = {"model/layers": KernelLayout(stack="model/layers")}
    adapter = init_adapter(jax.random.key(3), params, config, layouts=layouts)
    merged = merge_adapter(params, adapter, layouts=layouts)
    got = generate(lora_linen(model), combine(params, adapter), PROMPTS, max_new_tokens=12)
    assert got == generate(model, merged, PROMPTS, max_new_tokens=12)
    assert got != generate(model, params, PROMPTS, max_new_tokens=12)


def test_bfloat16_compute(config, params):
    model = CausalLM(config, dtype=jnp.bfloat16)
    got = generate(model, params, PROMPTS, max_new_tokens=4)
    assert [len(row) for row in got] == [4, 4, 4]
    assert all(0 <= token < config.vocab_size for row in got for token in row)


def test_no_prompts_no_texts(model, params):
    assert generate(model, params, [], max_new_tokens=4) == []


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 48]], {}, r"prompt 0 holds a token outside of 0\.\.47"),
        ([[1] * 61], {}, r"has 61 tokens, which with 4 new ones exceeds the model's 64 positions"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        ([[1]], dict(temperature=0.7), "sampling needs a key or a seed"),
        ([[1]], dict(temperature=-1.0), "temperature must be finite and at least 0"),
        ([[1]], dict(seed=-1), "seed must be a whole number"),
        ([[1]], dict(min_p=[1.5]), r"min_p must be in \[0, 1\], got \[1.5\]"),
        ([[1]], dict(top_k=[1, 2]), "top_k has 2 values for 1 prompts"),
        ([[1]], dict(repetition_penalty=0), "repetition_penalty must be finite and above 0"),
        ([[1]], dict(presence_penalty=float("nan")), "presence_penalty must be finite"),
        ([[1]], dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
    ],
    ids=str,
)
def test_bad_arguments(model, params, prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(model, params, prompts, **{"max_new_tokens": 4, **options})
