"""Each change of logits is the one that transformers makes; penalties of OpenAI's API by hand."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

from transformers.generation.logits_process import (  # noqa: E402
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_jax.models import SamplingParams  # noqa: E402
from lora_jax.models._sampling import RowParams, penalize, truncate  # noqa: E402

BATCH, VOCAB = 4, 1000
LOGITS = np.random.default_rng(0).normal(0, 3, (BATCH, VOCAB)).astype(np.float32)


def rows(**fields):
    return RowParams.of(SamplingParams(**fields), BATCH, BATCH, None)


@jax.jit
def ours(logits, params):
    scores = logits / params.temperature[:, None]
    return truncate(scores, params.top_k, params.top_p, params.min_p)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 1e-4},
        {"min_p": 0.05},
        {"top_k": 200, "top_p": 0.7, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_truncation_is_that_of_transformers(fields, temperature):
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [warper(fields[name]) for name, warper in warpers.items() if name in fields]
    expected = LogitsProcessorList(chain)(None, torch.tensor(LOGITS)).numpy()
    found = np.asarray(ours(LOGITS, rows(temperature=temperature, **fields)))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_array_max_ulp(found, expected, 1)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    rng = np.random.default_rng(1)
    prompt, text = rng.integers(0, VOCAB, (BATCH, 30)), rng.integers(0, VOCAB, (BATCH, 20))
    ids = torch.tensor(np.concatenate([prompt, text], axis=1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(LOGITS)).numpy()
    found = jax.jit(penalize)(
        LOGITS, counts_of(prompt) > 0, counts_of(text), rows(repetition_penalty=penalty)
    )
    np.testing.assert_array_max_ulp(np.asarray(found), expected, 1)


def test_presence_and_frequency_penalties_are_of_the_text_alone():
    rng = np.random.default_rng(2)
    prompt, text = (rng.integers(0, 40, (BATCH, 30)) for _ in range(2))
    presence, frequency = [0.0, 0.5, -1.0, 0.3], [0.0, 0.2, 0.7, -0.4]
    params = rows(presence_penalty=presence, frequency_penalty=frequency)
    found = jax.jit(penalize)(LOGITS, counts_of(prompt) > 0, counts_of(text), params)
    expected = LOGITS.astype(np.float64)
    for row in range(BATCH):
        for token in text[row]:
            expected[row, token] -= frequency[row]
        for token in set(text[row]):
            expected[row, token] -= presence[row]
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def test_rows_have_their_own_values():
    fields = dict(temperature=[0.5, 1, 2, 1], top_k=[0, 3, 7, 0], top_p=[0.9, 1, 0.8, 1])
    together = ours(LOGITS, rows(**fields))
    for row in range(BATCH):
        alone = ours(LOGITS, rows(**{name: values[row] for name, values in fields.items()}))
        np.testing.assert_array_equal(together[row], alone[row])


def counts_of(ids):
    return np.stack([np.bincount(row, minlength=VOCAB) for row in ids]).astype(np.int32)


def test_every_field_has_a_place_in_the_rows():
    names = {f.name for f in dataclasses.fields(SamplingParams)} - {"seed"}
    assert names == {f.name for f in dataclasses.fields(RowParams)} - {"key", "stream"}
