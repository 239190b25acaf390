"""The report of a run, as a person and a browser meet it."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

from lora_jax import InputError
from lora_jax.adapters import delta_spectra
from lora_jax.models import weight_norms
from lora_jax.report import read_run, write_report

from .conftest import MARKUP, RECORDED

VOID = {"meta", "br", "hr", "img", "link", "input"}
PICTURES = ["loss.png", "lengths.png", "progress.png", "deltas.png"]


class Killed(Exception):
    """What ends a run here."""


def dies_at_four(record):
    if record["step"] == 4:
        raise Killed


@pytest.fixture(scope="session")
def resumed(tiny):
    """A run that was cut off after its checkpoint, and went on; its rows hold markup."""
    options = {"samples": 2, "save_every": 2, "eval_every": 3}
    with pytest.raises(Killed):
        tiny("resumed", dies_at_four, **options)
    return tiny("resumed", **options)


@pytest.fixture(scope="session")
def full_report(tiny):
    return written(tiny("full", method="full", samples=1, learning_rate=1e-3))


class Page(HTMLParser):
    """The tags of a page, each of which must be closed in its place, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def names(self):
        return {tag for tag, _ in self.tags}

    def values(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="session")
def report(resumed):
    return written(resumed)


def written(directory):
    """The two texts of a report that is written anew."""
    path = write_report(read_run(directory))
    return path.read_text(), Page(path.with_suffix(".html").read_text())


@pytest.mark.parametrize("which", ["resumed", "full"])
def test_the_page_needs_nothing_beside_it_and_is_well_formed(which, request):
    _, page = request.getfixturevalue("report" if which == "resumed" else "full_report")
    assert not page.names() & {"script", "link", "iframe", "object", "img", "base"}
    assert not page.values("src")
    for reference in page.values("href") + page.values("xlink:href"):
        assert reference.startswith("#")
    style = "".join(page.text)
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", " ".join(page.values("clip-path")))
    assert used and set(used) <= set(ids)
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert len(pictures) == (4 if which == "resumed" else 3)


def test_pictures_stand_beside_the_markdown(report, resumed):
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", report[0])
    assert named == PICTURES
    assert all((resumed / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_what_stands_in_rows_is_text_and_not_markup(report):
    text, page = report
    assert sum(MARKUP in part for part in page.text) >= 2  # a training row and a prompt
    outside = "".join(re.split(r"^```+.*?^```+$", text, flags=re.DOTALL | re.MULTILINE))
    assert "<script" not in re.sub(r"\\<", "", outside)


def test_it_says_what_happened(report):
    text, page = report
    assert "6 steps" in text and "It went on from step 2." in text
    assert text.count("| started |") == 2
    assert "| rank 4, alpha 8, on q_proj, v_proj (4 modules)" in text
    assert re.search(r"\| rows +\| +32 \| +8 \|", text)
    assert "config.yaml --output DIR" in text
    assert "Every module" in "".join(page.text)


def test_samples_are_held_out_rows_answered_before_and_after(resumed, report):
    kept = json.loads((resumed / "samples.json").read_text())["samples"]
    assert [set(sample) for sample in kept] == 2 * [
        {"row", "prompt", "expected", "before", "after"}
    ]
    assert kept[0]["row"] == 4 and MARKUP in kept[0]["prompt"]
    assert kept[0]["expected"] == "one"
    assert all(sample["before"] != sample["after"] for sample in kept)
    text, _ = report
    assert text.index("before and after") < text.index("- expected: one")


def test_asking_changes_no_bit_of_the_training(resumed, tiny):
    """Nor does being cut off, with answers on the way."""
    silent = tiny("silent", save_every=2, eval_every=3)
    assert not (silent / "samples.json").exists()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (silent / "adapter" / name).read_bytes() == (resumed / "adapter" / name).read_bytes()


def test_a_run_that_fits_without_answers_is_trained_without(tiny, monkeypatch):
    def full(*given, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat 0x0")

    monkeypatch.setattr("lora_jax.train._samples.generate", full)
    run = read_run(tiny("full memory", samples=2, steps=2))
    assert run.finished and not run.samples
    assert run.no_samples == "RESOURCE_EXHAUSTED: Out of memory"


def test_norms_are_those_of_the_base(resumed, base_dir):
    norms = read_run(resumed).about["base_norms"]
    modules = [x.module for x in delta_spectra(resumed / "adapter")]
    assert sorted(norms) == sorted(modules)
    expected = weight_norms(base_dir, modules)
    np.testing.assert_allclose([norms[m] for m in modules], [expected[m] for m in modules], 1e-5)


def test_only_the_run_is_read(resumed, report, tmp_path, monkeypatch, undrawn):
    here = tmp_path / "resumed"
    shutil.copytree(resumed, here)
    monkeypatch.setattr("platform.python_version", lambda: "0.0")
    monkeypatch.setattr("sys.argv", ["other"])
    text, _ = written(here)
    assert text.replace(str(here), str(resumed)) == report[0]


@pytest.mark.parametrize(
    "missing", [["run.json"], ["run.json", "samples.json"], ["adapter"], ["loss.png", "report.md"]]
)
def test_a_run_without_some_files_has_a_report_of_the_others(resumed, tmp_path, missing, undrawn):
    here = tmp_path / "older"
    shutil.copytree(resumed, here)
    for name in missing:
        (shutil.rmtree if (here / name).is_dir() else type(here).unlink)(here / name)
    text, _ = written(here)
    assert "held-out loss" in text and "(loss.png)" in text
    assert ("The rows" in text) == ("run.json" not in missing)
    assert ("has learned" in text) == ("adapter" not in missing)


def test_a_run_that_was_killed_in_the_midst_of_a_line(resumed, tmp_path, undrawn):
    here = tmp_path / "killed"
    shutil.copytree(resumed, here)
    with open(here / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    shutil.rmtree(here / "adapter")
    assert "has not left its result yet" in written(here)[0]
    (here / "metrics.jsonl").write_text("")
    assert "| base" in written(here)[0]
    (here / "metrics.jsonl").write_text('{"st\n{"step": 0, "eval_loss": 2.0}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:1: not JSON"):
        read_run(here)
    (here / "run.json").write_text("[")
    (here / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"run.json: cannot read"):
        read_run(here)


def test_full_training_has_no_adapter_to_speak_of(full_report):
    text, _ = full_report
    assert "all weights" in text and "has learned" not in text and "frozen" not in text
    assert "- after: " in text


def test_the_best_weights_are_named(tmp_path, undrawn):
    here = tmp_path / "stopped"
    shutil.copytree(RECORDED, here)
    config = (here / "config.yaml").read_text()
    config = config.replace("patience: null", "patience: 2").replace("length: 256", "length: null")
    (here / "config.yaml").write_text(config)
    about = json.loads((here / "run.json").read_text())
    about["ended"]["early"] = True
    (here / "run.json").write_text(json.dumps(about))
    (here / "samples.json").write_text('{"samples": [], "left_out": "too many devices"}')
    text, _ = written(here)
    assert "The weights of step 50 were the best, and are kept." in text
    assert "stopped early, after 2 looks" in text and "Left out: too many devices." in text


def test_a_long_run_is_smoothed_without_a_lag(recorded):
    from lora_jax.report._figures import plot_run_loss, smoothed

    ramp = np.arange(500.0)
    np.testing.assert_allclose(smoothed(ramp, 12)[60:-60], ramp[60:-60])
    step = recorded.steps[-1]
    records = [{**step, "step": i, "loss": 2 + np.cos(i)} for i in range(500)]
    run = dataclasses.replace(recorded, records=records)
    labels = [line.get_label() for line in plot_run_loss(run).axes[0].lines]
    assert labels[:2] == ["training", "training, smoothed"]
