"""Runs whose files are broken: a line that says so, or a report of the other files."""

import json
import shutil

import numpy as np
import pytest

from lora_jax import InputError
from lora_jax._tokenizer import Tokenizer
from lora_jax.report import advice, read_run, write_report
from lora_jax.train import Job
from lora_jax.train._about import _starts, read_kept, write_end
from lora_jax.train._samples import NEW_TOKENS, SAMPLES_FILE, _beginning, answer_after

from .conftest import RECORDED

STEP = {
    "step": 5,
    "steps": 60,
    "loss": 2.0,
    "tokens": 9,
    "tokens_per_second": 1.0,
    "peak_memory_bytes": 1,
}


@pytest.fixture
def here(tmp_path, undrawn):
    shutil.copytree(RECORDED, tmp_path / "run")
    return tmp_path / "run"


def text_of(here):
    run = read_run(here)
    advice(run)
    return write_report(run).read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl: not a text in UTF-8"),
        ("metrics.jsonl", b"[]\n", "metrics.jsonl:1: not a record"),
        ("metrics.jsonl", b'{"step": 1}\n5\n', "metrics.jsonl:2: not a record"),
        ("metrics.jsonl", b'{"loss": 1.0}\n', "metrics.jsonl:1: not a record"),
        ("metrics.jsonl", b'{"step": null, "loss": 1.0}\n', "metrics.jsonl:1: not a record"),
        ("config.yaml", b"[]", "config.yaml: must hold sections"),
        ("config.yaml", b"5", "config.yaml: must hold sections"),
        ("config.yaml", b"\xff", "config.yaml: not a text in UTF-8"),
        ("config.yaml", b"train: {steps: 3}", "config.yaml"),
        ("config.yaml", b"data: 3\noutput: x", "config.yaml"),
        ("run.json", b"\xff", "run.json: cannot read"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(here, name, content, message):
    (here / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_run(here)
    assert "\n" not in str(error.value)


def test_a_config_of_few_words_has_the_other_settings_all_the_same(here):
    (here / "config.yaml").write_text("data: {train: stdlib}\noutput: runs/quickstart\n")
    assert "rank 8" in text_of(here)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"data": {}}',
        '{"data": {"train": {}, "eval": {}, "rows": []}}',
        '{"ended": null, "starts": null, "counts": [], "targets": 3, "base_norms": null}',
        '{"starts": [1, {"time": 3}], "base_norms": {"a": null}, "counts": {"trainable": 3}}',
    ],
)
def test_parts_of_another_shape_are_left_out(here, content):
    (here / "run.json").write_text(content)
    text = text_of(here)
    assert "held-out loss" in text and "The rows" not in text and "started" not in text


def test_a_digest_may_be_missing_but_is_a_word(here):
    about = json.loads((here / "run.json").read_text())
    del about["data"]["train"]["digest"]
    (here / "run.json").write_text(json.dumps(about))
    assert "The rows" in text_of(here)
    about["data"]["eval"]["digest"] = []
    (here / "run.json").write_text(json.dumps(about))
    assert "The rows" not in text_of(here)


def test_parts_beside_a_broken_one_stay(here):
    about = json.loads((here / "run.json").read_text())
    (here / "run.json").write_text(json.dumps({**about, "data": {}, "ended": None}))
    text = text_of(here)
    assert "The rows" not in text and "started" in text and "286,720 parameters" in text


@pytest.mark.parametrize("name", ["samples", "summary"])
@pytest.mark.parametrize(
    "content",
    ["[1]", "5", '{"samples": 3, "fair": {}}', '{"samples": [{"prompt": "x", "after": "y"}, 1]}'],
)
def test_samples_and_summaries_of_another_shape_are_left_out(here, name, content):
    (here / f"{name}.json").write_text(content)
    text = text_of(here)
    assert "same prompts" not in text and "fairly" not in text


def test_losses_that_overflowed_are_in_no_line(here):
    records = [
        {"step": 0, "eval_loss": None},
        STEP,
        {**STEP, "step": 10, "loss": None},
        {**STEP, "step": 15, "loss": float("nan")},
        {"step": 15, "eval_loss": float("inf")},
        {"step": 20, "loss": 1.5},
    ]
    (here / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(here)
    assert run.line("loss") == ([5, 20], [2.0, 1.5]) and run.steps == [STEP] and not run.looks
    assert "last training loss 2.0000" in text_of(here)


@pytest.mark.parametrize("content", ["[]", "5", "[", "null", b"\xff", '{"samples": [1]}', None])
def test_a_broken_file_beside_the_results_holds_nothing(tmp_path, content):
    path = tmp_path / SAMPLES_FILE
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_kept(path) == ({"samples": [1]} if "samples" in str(content) else {})
    answer_after(object.__new__(Job), {}, tmp_path)  # a job that would fail if it were asked


@pytest.mark.parametrize("content", ["[]", "[", '{"starts": null, "counts": 3}'])
def test_a_run_goes_on_beside_a_broken_file(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert _starts(tmp_path) == []
    write_end(tmp_path, 7, early=False)
    assert json.loads((tmp_path / "run.json").read_text())["ended"]["step"] == 7


def test_what_is_expected_is_no_longer_than_an_answer_may_be(monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " ".join(map(str, ids)))
    numbers = object.__new__(Tokenizer)
    assert _beginning(np.arange(3), numbers) == "0 1 2"
    assert _beginning(np.arange(NEW_TOKENS), numbers).endswith(f" {NEW_TOKENS - 1}")
    assert _beginning(np.arange(NEW_TOKENS + 1), numbers).endswith(f" {NEW_TOKENS - 1}…")
