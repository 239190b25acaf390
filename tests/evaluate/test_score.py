"""Scores against log-softmax written out, for any batch, chunk and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import InputError
from lora_jax.data import eval_batches
from lora_jax.evaluate import RowLosses, Scorer, cut_at, measure_on, row_losses
from lora_jax.train import evaluate, examples_of, make_eval_step, run_config, training_rows
from lora_jax.transform import lora_linen

VOCABULARY, LONGEST = 7, 40


@jax.jit
def bigram_logits(params, ids):
    """A causal model whose logits depend on this token and on all before it."""
    seen = jnp.cumsum(jax.nn.one_hot(ids, VOCABULARY), axis=1)
    return jnp.cos(params[ids] + seen @ params)


PARAMS = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def directly(ids, chosen):
    log_p = jax.nn.log_softmax(bigram_logits(PARAMS, np.array([ids]))[0], axis=-1)
    targets, mask = np.array(ids[1:], int), np.array(chosen[1:], bool)
    picked = np.asarray(log_p)[np.arange(len(targets)), targets]
    greedy = np.asarray(log_p)[:-1].argmax(-1) == targets
    return picked[mask].sum(), bool(greedy[mask].all())


sequences = st.lists(
    st.lists(
        st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=1, max_size=LONGEST + 1
    ),
    max_size=5,
)


@settings(max_examples=20)
@given(sequences, st.sampled_from([1, 4]), st.sampled_from([3, 1000]))
def test_scores_are_those_of_log_softmax(sequences, batch_size, chunk):
    given_ = [([t for t, _ in s], [c for _, c in s]) for s in sequences]
    scores = scorer(chunk).score({"p": PARAMS}, given_, batch_size=batch_size)
    for found, (ids, chosen) in zip(scores, given_, strict=True):
        total, greedy = directly(
            ids + [0] * (LONGEST + 1 - len(ids)), chosen + [False] * (LONGEST + 1 - len(ids))
        )
        assert found.log_likelihood == pytest.approx(total, abs=1e-4)
        assert found.greedy == greedy


@functools.cache
def scorer(chunk):
    made = Scorer.of_apply(lambda params, ids: bigram_logits(params["p"], ids), LONGEST)
    return Scorer(made.states, made.head, LONGEST, chunk)


def test_few_lengths_are_compiled():
    fresh = Scorer.of_apply(lambda params, ids: bigram_logits(params["p"], ids), LONGEST)
    many = [([1] * n, [True] * n) for n in range(1, LONGEST + 2)]
    fresh.score({"p": PARAMS}, many, batch_size=4)
    assert fresh.program._cache_size() == 3  # 16, 32 and 40
    fresh.score({"p": PARAMS}, many[::-1], batch_size=4)
    assert fresh.program._cache_size() == 3


def test_no_more_tokens_than_the_model_reads():
    with pytest.raises(InputError, match="42 tokens is longer than the 41"):
        scorer(3).score({"p": PARAMS}, [([0] * 42, [True] * 42)])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        scorer(3).score({"p": PARAMS}, [], batch_size=0)


def test_the_loss_is_that_of_training(pretrained, rows_file, base_dir):
    """Rows apart and in padded lengths, against the packed batches of a run's evaluation."""
    config = run_config(
        {"model": {"path": str(base_dir)}, "data": {"train": str(rows_file)}, "output": "none"},
        ["--data.max_length=64"],
        "test",
    )
    rows = training_rows(config.data)
    losses = measure_on(config, rows, pretrained)(pretrained.params)
    examples = examples_of(rows, config.data, pretrained)
    batches = eval_batches(examples, batch_size=4, seq_length=64, packing=True)
    packed = evaluate(make_eval_step(lora_linen(pretrained.module)), pretrained.params, batches)
    assert losses.loss == pytest.approx(packed.loss, rel=1e-6)
    assert int(losses.tokens.sum()) == packed.tokens and len(losses.nats) == len(rows)
    assert losses.perplexity == pytest.approx(np.exp(losses.loss))


def test_pieces_of_a_text_are_one_row(pretrained, text_model, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        '{"text": "' + "one two three " * 20 + '"}\n{"text": "one"}\n'
    )
    config = run_config(
        {"data": {"train": str(tmp_path / "long.jsonl")}, "output": "none"},
        ["--data.max_length=48"],
        "x",
    )
    examples = examples_of(training_rows(config.data), config.data, pretrained)
    assert len(examples) > 2
    losses = row_losses(text_model.scorer, pretrained.params, examples)
    assert len(losses.nats) == 2 and losses.tokens.sum() == sum(e.loss_mask.sum() for e in examples)


def test_the_standard_error_is_that_of_resampled_rows():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 30, size=200)
    nats = tokens * rng.gamma(4.0, 0.5, size=200)
    losses = RowLosses(nats, tokens)
    drawn = rng.integers(0, 200, size=(4000, 200))
    resampled = nats[drawn].sum(1) / tokens[drawn].sum(1)
    assert losses.standard_error == pytest.approx(resampled.std(), rel=0.05)
    paired = RowLosses(nats - 0.1 * tokens, tokens).minus(losses)
    assert paired.loss == pytest.approx(-0.1) and paired.standard_error < 1e-12
    assert RowLosses(nats[:1], tokens[:1]).standard_error is None


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", max_size=2), max_size=3))
def test_a_text_is_cut_before_its_first_stop(text, until):
    cut = cut_at(text, until)
    assert text.startswith(cut) and not any(stop and stop in cut for stop in until)
    rest = text[len(cut) :]
    assert not rest or any(stop and rest.startswith(stop) for stop in until)
