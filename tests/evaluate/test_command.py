"""`./lora evaluate`: a run on its own rows, files, exact matches, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_jax._evaluations import _plain_losses, _show_losses
from lora_jax.cli import main
from lora_jax.evaluate import HeldOutLosses, RowLosses


@pytest.fixture(scope="module")
def run(base_dir: Path, rows_file: Path, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    config = {
        "model": {"path": str(base_dir), "remat": "everything"},
        "quant": {"format": "nf4"},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(rows_file), "max_length": 64, "eval_share": 0.2},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "tensorboard": False,
            "samples": 0,
        },
        "output": str(directory / "run"),
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(directory / "run.yaml")])
    return directory / "run"


def test_a_run_is_measured_as_it_measured_itself(run: Path, capsys):
    main(["evaluate", str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = [r for r in records if "eval_loss" in r]
    assert found["base"]["loss"] == pytest.approx(looks[0]["eval_loss"], rel=1e-5)
    assert found["trained"]["loss"] == pytest.approx(looks[-1]["eval_loss"], rel=1e-5)
    assert found["tokens"] == looks[0]["eval_tokens"] and found["rows"] == 8
    difference = found["trained"]["loss"] - found["base"]["loss"]
    assert found["difference"]["loss"] == pytest.approx(difference)
    assert 0 < found["difference"]["standard_error"] < found["base"]["standard_error"]


def test_losses_as_text_and_as_json():
    base = RowLosses(np.array([3.0, 1.0]), np.array([2, 2]))
    trained = RowLosses(np.array([2.0, 1.0]), np.array([2, 2]))
    assert _show_losses(HeldOutLosses(base)) == (
        "loss 1.0000 ± 0.5000 nats per token, perplexity 2.72; 2 rows, 4 trained tokens"
    )
    assert _show_losses(HeldOutLosses(base, trained)).splitlines() == [
        "base       loss 1.0000 ± 0.5000 nats per token, perplexity 2.72",
        "trained    loss 0.7500 ± 0.2500 nats per token, perplexity 2.12",
        "difference -0.2500 ± 0.2500; 2 rows, 4 trained tokens",
    ]
    alone = _plain_losses(HeldOutLosses(RowLosses(base.nats[:1], base.tokens[:1])))
    assert alone["base"]["standard_error"] is None and json.loads(json.dumps(alone)) == alone
    assert set(alone) == {"base", "rows", "tokens"}


def test_exact_match_writes_records(run: Path, base_dir, tmp_path, capsys):
    rows = [{"question": f"one {i}", "answer": f"It is\n#### {i}"} for i in range(3)]
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--model", str(base_dir), "--adapter", str(run / "adapter")]
    words += ["--exact-match", str(output), "--max-new-tokens", "4", "--json"]
    main([*words, "--data", str(data)])
    found = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["expected"] for r in records] == ["0", "1", "2"]
    # An adapter trained on prompt and completion is asked in its own template.
    assert [r["prompt"] for r in records] == ["one 0", "one 1", "one 2"]
    right = sum(r["correct"]["strict"] for r in records)
    assert found["strict"]["correct"] == right and found["flexible"]["rows"] == 3

    data.write_text('{"prompt": "a", "completion": "1"}\n')
    assert "has no column 'question'" in refused(capsys, *words, "--data", str(data))
    data.write_text("")
    assert "holds no rows" in refused(capsys, *words, "--data", str(data))


def test_what_does_not_go_together_is_refused(run: Path, base_dir, tmp_path, capsys):
    model = ["--model", str(base_dir)]
    for words, message in (
        ([], "give a run's directory, or --model DIR"),
        ([str(run), *model], "give a run's directory, or --model DIR"),
        ([str(run), "--data", "x"], "a run has its own data; leave --data out"),
        (model, "with --model give --data FILE, or --harness TASKS"),
        ([*model, "--data", "x", "--limit", "3"], "--limit goes with --harness"),
        ([*model, "--data", "x", "--max-new-tokens", "3"], "goes with --exact-match"),
        ([*model, "--exact-match", "y", "--data", "x", "--harness", "z"], "with --model give"),
        ([str(run), "--exact-match", "y", "--harness", "z"], "are two evaluations; give one"),
        ([str(tmp_path)], "no config.yaml, so no run"),
        ([*model, "--data", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
    ):
        assert message in refused(capsys, "evaluate", *words)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "holds no adapter/ yet" in refused(capsys, "evaluate", str(tmp_path))


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err
