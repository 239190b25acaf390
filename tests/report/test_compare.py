"""Runs laid over each other."""

import io
import json
import re
import shutil

import pytest

from lora_jax.cli import main
from lora_jax.report import read_run
from lora_jax.report._compare import plot_runs

from .conftest import RECORDED


@pytest.fixture
def two(tmp_path):
    """The recorded run, and one of a higher rank that is better."""
    one, other = tmp_path / "rank16", tmp_path / "rank32"
    shutil.copytree(RECORDED, one)
    shutil.copytree(RECORDED, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("r: 16", "r: 32"))
    metrics = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(metrics.replace("3.422340083135521", "3.25"))
    return one, other


def rows(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_two_runs_in_a_table(two, tmp_path, capsys):
    main(["compare", *map(str, two), "--output", str(tmp_path / "both")])
    out = capsys.readouterr().out
    table = rows(out)
    assert table[""] == ["rank16", "rank32"]
    assert table["lora.r"] == ["16", "32"] and "train.steps" not in table and "output" not in table
    assert table["held-out loss before"] == ["5.3041", "5.3041"]
    assert table["held-out loss after"] == ["3.4223", "3.2500"]
    assert table["best"] == ["3.4223 at step 50", "3.2500 at step 60"]
    assert table["trainable parameters"] == ["286,720", "286,720"]
    assert table["adapter's file"] == ["–", "–"]
    assert "note:" not in out
    text = (tmp_path / "both" / "compare.md").read_text()
    assert all(rows(text)[name] == cells for name, cells in table.items() if name)
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == ["compare.png"]
    assert (tmp_path / "both" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "both" / "compare.html").read_text()


def test_runs_of_other_rows_are_said_to_be(two, tmp_path, capsys, undrawn):
    about = json.loads((two[1] / "run.json").read_text())
    about["data"]["eval"]["digest"] = "0" * 16
    (two[1] / "run.json").write_text(json.dumps(about))
    main(["compare", *map(str, two), "--output", str(tmp_path / "both")])
    notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert notes == [
        "note: the held-out rows or their tokens differ: these losses are of other data"
    ]
    (two[1] / "run.json").unlink()
    main(["compare", *map(str, two), "--output", str(tmp_path / "both")])
    assert capsys.readouterr().out.count("only their files agree") == 2


def test_a_run_that_was_stopped_is_said_to_be(two, tmp_path, capsys, undrawn):
    metrics = (two[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (two[1] / "metrics.jsonl").write_text("".join(metrics[:2]))
    about = json.loads((two[1] / "run.json").read_text())
    del about["ended"]
    (two[1] / "run.json").write_text(json.dumps(about))
    main(["compare", *map(str, two), "--output", str(tmp_path / "both")])
    out = capsys.readouterr().out
    assert "note: rank32 is not finished (step 5 of 60)" in out and "rank16 is not" not in out
    assert rows(out)["held-out loss after"] == ["3.4223", "–"]


def test_names_of_runs_are_shown_as_they_are(two, tmp_path):
    names = ["_a$b$", "c_$x^2$"]
    runs = [read_run(one.rename(tmp_path / name)) for one, name in zip(two, names, strict=True)]
    figure = plot_runs(runs)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [r" _a\$b\$", r"c_\$x^2\$"]
    figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "ONE"], "two runs or more"),
        (["compare", "ONE", "nowhere"], "nowhere/metrics.jsonl: no such file"),
        (["report", "nowhere"], "nowhere/metrics.jsonl: no such file"),
        (["report", "ONE", "--lora.r", "4"], "takes no --lora.r"),
    ],
)
def test_what_is_refused(two, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([str(two[0]) if word == "ONE" else word for word in words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_report_is_written_anew(two, capsys, undrawn):
    main(["report", str(two[0])])
    path = two[0] / "report.md"
    assert capsys.readouterr().out == f"{path}\n" and "# rank16" in path.read_text()
