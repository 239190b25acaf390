"""Advice: nothing on a healthy run, one line where something is wrong."""

import dataclasses

import numpy as np
import pytest

from lora_jax.adapters import DeltaSpectrum
from lora_jax.report import advice, read_run

from .conftest import write_rows


def with_config(run, section, **values):
    return dataclasses.replace(
        run, config={**run.config, section: {**run.config[section], **values}}
    )


def with_data(run, **values):
    data = {**run.about["data"], "train": {**run.data, **values}}
    return dataclasses.replace(run, about={**run.about, "data": data})


def with_lines(run, **lines):
    """Other numbers in the records that hold these keys."""
    records = [dict(record) for record in run.records]
    for key, values in lines.items():
        chosen = [record for record in records if key in record]
        for record, value in zip(chosen, values, strict=True):
            record[key] = value
    return dataclasses.replace(run, records=records)


def with_spectrum(run, values, rank=16):
    spectra = [DeltaSpectrum(x.module, rank, np.asarray(values)) for x in run.spectra]
    return dataclasses.replace(run, spectra=spectra)


def test_a_healthy_run_gets_none(recorded):
    assert recorded.steps and recorded.shares and advice(recorded) == []


def falling(count=12):
    return 3 * np.exp(-np.arange(count) / 2) + 2


def spiked(*places):
    losses = falling()
    losses[list(places)] *= 2
    return losses.tolist()


LOST = {"answer beyond max_length": 300, "nothing to train on in it": 8}
CASES = {
    "overfitting": (
        lambda run: with_lines(run, eval_loss=[5.3, 3.5, 3.4, 3.45, 3.6, 3.8, 4.0]),
        "overfitting: the held-out loss rose from 3.400 at step 20 to 4.000 at step 60 (+0.600);"
        " set train.patience: 3, lora.lora_dropout: 0.05, a smaller lora.r, or train.steps: 20",
    ),
    "worse than before": (
        lambda run: with_lines(run, eval_loss=[3.0, 3.2, 3.3, 3.3, 3.3, 3.3, 3.3]),
        "worse than before: the held-out loss rose from 3.000 before training to 3.300 at step 60"
        " (+0.300), and never was lower; set train.learning_rate: 1e-3 (now 0.003), or check that"
        " held-out rows and training rows are of the same kind",
    ),
    "a spike": (
        lambda run: with_lines(run, loss=spiked(7)),
        "learning rate: the training loss jumped from 2.246 to 4.181 at step 40; set"
        " train.learning_rate: 1e-3 (now 0.003)",
    ),
    "diverging": (
        lambda run: with_lines(run, loss=[4, 3, 2.5, 2.4, 2.3, 2.4, 2.6, 2.9, 3.3, 3.8, 4.4, 5]),
        "learning rate: the training loss rose from 2.367 to 4.400; set train.learning_rate: 1e-3"
        " (now 0.003)",
    ),
    "a steep gradient": (
        lambda run: with_lines(run, grad_norm=[2, 1, 1, 1, 1, 40, 1, 1, 1, 1, 1, 1]),
        "learning rate: the gradient's norm jumped from 1 to 40; set train.learning_rate: 1e-3"
        " (now 0.003)",
    ),
    "clipped": (
        lambda run: with_lines(run, grad_norm=[8.0] * 12),
        "clipping: the gradient's norm was 8 at the median, and clipped to 1 in 100 % of the"
        " records; set train.clip_norm: 8 (now 1)",
    ),
    "no delta": (
        lambda run: with_spectrum(with_lines(run, eval_loss=[5.3] * 7), np.zeros(16)),
        "the adapter does nothing: its delta has not moved, the held-out loss changed by +0.00 %;"
        " set train.learning_rate: 3e-2 (now 0.003), or more train.steps",
    ),
    "a straight line": (
        lambda run: with_lines(run, loss=np.linspace(5, 3, 12).tolist()),
        "still learning: the last quarter brought 27 % of the fall of the training loss (3.545 to"
        " 3.000); set train.steps: 120, or train.learning_rate: 6e-3 (now 0.003)",
    ),
    "one direction": (
        lambda run: with_spectrum(run, [1.0, *[1e-3] * 15]),
        "rank: 1 directions hold 99 % of nine deltas in ten, of 16; set lora.r: 1, and"
        " leave lora.lora_alpha as it is",
    ),
    "not packed": (
        lambda run: with_config(with_data(run, places=1_000_000), "data", packing=False),
        "padding: 61 % of the batches is padding; set data.packing: true",
    ),
    "short rows": (
        lambda run: with_config(with_data(run, places=1_000_000), "data", max_length=1024),
        "padding: 61 % of the batches is padding; set data.max_length: 256",
    ),
    "few answers": (
        lambda run: with_data(run, trained_tokens=3_913),
        "masked: 3,913 of 391,290 tokens are trained on (1.0 %); set data.train_on: all (now"
        " answer), or shorten the prompts",
    ),
    "long rows": (
        lambda run: with_data(run, truncated=100, dropped=LOST),
        "rows: 100 truncated and 308 dropped (300: answer beyond max_length, 8: nothing to train on"
        " in it) of 4,141; set a longer data.max_length",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_line(recorded, case):
    change, line = CASES[case]
    assert advice(change(recorded)) == [line]


def test_patience_has_dealt_with_overfitting(recorded):
    change, _ = CASES["overfitting"]
    assert advice(with_config(change(recorded), "train", patience=2)) == []


def test_patience_does_not_hide_what_is_worse_than_before(recorded):
    change, _ = CASES["worse than before"]
    (line,) = advice(with_config(change(recorded), "train", patience=2))
    assert "rose from 3.000 before training to 3.200 at step 10" in line


def test_a_held_out_loss_that_rises_with_the_other_is_no_overfitting(recorded):
    change, _ = CASES["overfitting"]
    rising = with_lines(change(recorded), loss=np.linspace(3, 3.1, 12).tolist())
    assert advice(rising) == []


def test_a_run_that_was_stopped_is_not_too_short(recorded):
    change, _ = CASES["a straight line"]
    run = change(recorded)
    assert advice(with_lines(run, steps=[120] * 12)) == []


@pytest.mark.parametrize("count", [8, 9, 12, 16, 40, 120])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_noise_around_a_flat_line_says_nothing(recorded, count, noise):
    step = recorded.steps[-1]

    def told(seed):
        losses = 2 + noise * np.random.default_rng(seed).standard_normal(count)
        records = [
            {**step, "step": i, "steps": count, "loss": float(loss)}
            for i, loss in enumerate(losses, 1)
        ]
        return advice(dataclasses.replace(recorded, records=records, spectra=[]))

    assert sum(not told(seed) for seed in range(100)) >= 97


def test_a_run_that_was_stopped_before_its_first_look_has_no_loss_after(recorded):
    run = dataclasses.replace(recorded, records=recorded.records[:2])
    assert run.looks and run.kept is None and run.best is None and advice(run) == []


def test_a_run_that_tells_little_gets_none(recorded):
    bare = dataclasses.replace(recorded, records=[], about={}, spectra=[])
    assert advice(bare) == []


def test_overflowed_gradients_are_passed_over(recorded):
    assert advice(with_lines(recorded, grad_norm=[None, *[1.0] * 11])) == []


# Trained here: what the lines above claim of numbers that nobody made up.


def begins(run, word):
    return [line for line in advice(read_run(run)) if line.startswith(word)]


@pytest.mark.slow
def test_rows_without_a_rule_are_learned_by_heart(tiny, tmp_path):
    words, draw = ["one", "two", "three", "four", "five"], np.random.default_rng(0)
    rows = [{"prompt": f"{i}", "completion": " ".join(draw.choice(words, 4))} for i in range(24)]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    options = {
        "steps": 120,
        "eval_every": 10,
        "batch_size": 8,
        "lora": {"target_modules": "all-linear"},
    }
    run = tiny("by heart", data=data, **options)
    assert begins(run, "overfitting: the held-out loss rose from")
    best = read_run(run).best
    assert 0 < best["step"] < 60 and f"train.steps: {best['step']}" in advice(read_run(run))[0]


def test_a_rate_that_is_too_high(tiny):
    run = tiny("high", steps=60, learning_rate=3.0, schedule="constant", log_every=1)
    (line,) = begins(run, "learning rate: ")
    assert "set train.learning_rate: 1e0 (now 3)" in line


def test_a_rate_that_is_far_too_low(tiny):
    run = tiny("low", steps=6, learning_rate=1e-9, log_every=1)
    (line,) = advice(read_run(run))
    assert line.startswith("the adapter does nothing: its delta is ")
    assert "set train.learning_rate: 1e-8 (now 1e-09)" in line
