"""A sweep's table and picture."""

import json

import pytest

from lora_jax import InputError
from lora_jax.report import draw_sweep, read_sweep, sweep_table


def write(directory, varied, losses):
    records = [
        {"varied": v, "before": 3.0, "loss": loss, "step": 5, "trainable": 1024, "together": 2,
         "seconds": 1.0}
        for v, loss in zip(varied, losses, strict=True)
    ]  # fmt: skip
    (directory / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def lines_of(directory, monkeypatch):
    """What the picture shows: the lines' labels and points, and its axes."""
    from lora_jax.report import _sweep

    seen = {}
    monkeypatch.setattr(_sweep, "save_figure", lambda figure, axes, path: seen.update(axes=axes))
    assert draw_sweep(directory) == directory / "sweep.png"
    (axes,) = seen["axes"]
    points = {x.get_label(): [list(map(float, xy)) for xy in x.get_xydata()] for x in axes.lines}
    return points, axes


def test_losses_stand_over_ranks_a_line_for_each_learning_rate(tmp_path, monkeypatch):
    varied = [{"lora.r": r, "train.learning_rate": x} for r in (8, 1) for x in (1e-3, 1e-2)]
    write(tmp_path, varied, [2.0, 1.9, 2.5, None])
    points, axes = lines_of(tmp_path, monkeypatch)
    assert points["learning_rate 0.001"] == [[1, 2.5], [8, 2.0]]
    assert points["learning_rate 0.01"][1] == [8, 1.9]
    assert points["before"][0][1] == 3.0
    assert axes.get_xlabel() == "lora.r" and axes.get_xscale() == "log"


def test_words_stand_side_by_side(tmp_path, monkeypatch):
    varied = [{"lora.target_modules": x} for x in (["q_proj", "v_proj"], "all-linear")]
    write(tmp_path, varied, [2.0, 1.5])
    points, axes = lines_of(tmp_path, monkeypatch)
    assert points["held-out"] == [[0, 2.0], [1, 1.5]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q_proj+v_proj", "all-linear"]


def test_the_picture_is_a_picture(tmp_path):
    write(tmp_path, [{"train.learning_rate": 1e-3}, {"train.learning_rate": 1e-2}], [2.0, 1.5])
    assert draw_sweep(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_table_begins_with_the_best(tmp_path):
    write(tmp_path, [{"lora.r": 1}, {"lora.r": 2}, {"lora.r": 4}], [2.5, None, 1.5])
    lines = sweep_table(read_sweep(tmp_path)).splitlines()
    assert lines[2] == "| 4 | 1.5000 | -50.0 % | 1,024 | 5 |"
    assert lines[3].startswith("| 1 |") and lines[4] == "| 2 | diverged |  | 1,024 | 5 |"


def test_what_is_missing_or_broken_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.jsonl").write_text("")
    with pytest.raises(InputError, match="no record"):
        draw_sweep(tmp_path)
