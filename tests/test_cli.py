"""The command line as a person meets it: what it prints, writes and refuses."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_jax.cli import main


def write_config(directory: Path, base_dir: Path, rows_file: Path) -> Path:
    path = directory / "run.yaml"
    config = {
        "model": {"path": str(base_dir), "remat": "everything"},
        "quant": {"format": "nf4"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": str(rows_file), "eval_share": 0.2, "max_length": 64},
        "train": {
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "tensorboard": False,
            "samples": 0,
        },
        "output": str(directory / "run"),
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def no_control_characters(request, monkeypatch) -> Iterator[None]:
    """What is captured is no terminal, so nothing of what a terminal understands goes there."""
    shown: list[str] = []
    if "capsys" in request.fixturenames:
        request.getfixturevalue("capsys")
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "write", _recorder(stream.write, shown))
    yield
    assert "\x1b" not in "".join(shown) and "\r" not in "".join(shown)


def _recorder(write: Callable[[str], int], shown: list[str]) -> Callable[[str], int]:
    def record(text: str) -> int:
        shown.append(text)
        return write(text)

    return record


@pytest.fixture
def run_file(base_dir: Path, rows_file: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, base_dir, rows_file)


@pytest.fixture(scope="module")
def trained(base_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left; it is only read."""
    directory = tmp_path_factory.mktemp("trained")
    main(["train", str(write_config(directory, base_dir, rows_file))])
    return directory / "run"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command refuses with."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert "usage" not in err and "Traceback" not in err
    return err


def test_train_leaves_what_it_promises_and_its_config_repeats_it(capsys, trained, tmp_path):
    again = tmp_path / "again"
    main(["train", str(trained / "config.yaml"), "--output", str(again)])
    assert {p.name for p in again.iterdir()} >= {
        "adapter", "metrics.jsonl", "loss.png", "report.md", "report.html", "run.json",
        "config.yaml", "checkpoints",
    }  # fmt: skip
    losses = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in losses if "eval_loss" in r] == [0, 2]
    assert (again / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (again / "report.md").read_text()
    assert "| held-out loss" in report and "nf4" in report
    assert "held-out loss" in capsys.readouterr().out
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_what_does_not_fit_is_said_before_training(run_file: Path, capsys) -> None:
    main(["train", str(run_file), "--dry-run", "--data.template", "chatml"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: the template writes <|im_start|>, which the tokenizer cuts into pieces; add them"
        ' (model.add_tokens: ["<|im_start|>"]), or give template: alpaca'
    ]
    added = ["--model.add_tokens", '["<|im_start|>", "<|im_end|>"]']
    main(["train", str(run_file), "--dry-run", "--data.template", "chatml", *added])
    out = capsys.readouterr().out
    assert "note: " not in out and "trainable_token_indices" in out


def test_dry_run_shows_targets_and_counts_and_writes_nothing(run_file: Path, tmp_path, capsys):
    main(["train", str(run_file), "--dry-run", "--lora.r", "2"])
    out = capsys.readouterr().out
    assert re.search(r"self_attn/q_proj/kernel +2 of 2 +2 +64 -> 64 +512", out)
    assert re.search(r"model/norm/weight +64 +one axis", out)
    assert re.search(r"trainable: [\d,]+ parameters", out) and "frozen:" in out
    assert "steps: 2" in out
    assert not (tmp_path / "run").exists()


def test_evaluate_merge_and_generate_agree(trained: Path, base_dir, rows_file, tmp_path, capsys):
    adapter, merged = str(trained / "adapter"), str(tmp_path / "merged")
    main(["merge", "--model", str(base_dir), "--adapter", adapter, "--output", merged])
    difference = float(re.findall(r"by ([\d.e+-]+) of the largest", capsys.readouterr().out)[-1])
    assert difference < 1e-5

    def loss(*words: str) -> float:
        main(["evaluate", "--data", str(rows_file), "--data.max_length", "64", *words])
        return float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[-1])

    adapted = loss("--model", str(base_dir), "--adapter", adapter)
    assert adapted == pytest.approx(loss("--model", merged), abs=2e-4)
    assert adapted < loss("--model", str(base_dir))

    def answer(*words: str) -> str:
        main(["generate", "--prompt", "one 1", "--max-new-tokens", "8", *words])
        return capsys.readouterr().out

    template = ["--template", "plain"]
    with_adapter = answer("--model", str(base_dir), "--adapter", adapter)
    assert with_adapter == answer("--model", merged, *template)


def test_inspect_shows_every_layer_and_the_loss_of_every_format(base_dir, rows_file, capsys):
    words = ["--data", str(rows_file), "--data.max_length", "64", "--formats", "int4-zero,int8"]
    main(["inspect", str(base_dir), "--quant", *words])
    out = capsys.readouterr().out
    lines = out.splitlines()
    layers = [line for line in lines if line.startswith("model/layers/")]
    assert len(layers) == 2 * 7 and layers[0].startswith("model/layers/0/mlp/down_proj ")
    assert len(re.findall(r"0\.\d{4}", layers[0])) == 5
    dense = float(re.search(r"held-out loss ([\d.]+) nats", out)[1])
    losses = {name: float(x) for name, x in re.findall(r"^  ([\w-]+) +([\d.]+) \(", out, re.M)}
    assert list(losses) == ["int4-zero", "int8"]
    assert abs(losses["int8"] - dense) < 0.01
    assert "(did you mean 'nf4'?)" in refused(
        capsys, "inspect", str(base_dir), "--quant", "--formats", "nf5"
    )


def test_generate_talks_until_an_empty_line(base_dir: Path, monkeypatch, capsys):
    lines = iter(["one 1", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["generate", "--model", str(base_dir), "--max-new-tokens", "4"])
    assert capsys.readouterr().out.count("\n") >= 1


def test_data_show_tells_trained_from_masked(base_dir: Path, rows_file: Path, capsys):
    main(["data", "show", str(rows_file), "--model", str(base_dir), "--count", "2"])
    out = capsys.readouterr().out
    assert "⟦one</s>⟧" in out and "prompt_completion" in out


def test_data_make_then_show(tmp_path: Path, capsys):
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(4):
        (documents / f"{i}.md").write_text(f"# Topic {i}\n\nThe answer to topic {i} is {i * 7}.\n")
    main(["data", "make", str(documents), "--held-out", "0.3"])
    assert f"in `{tmp_path / 'documents-rows'}`" in capsys.readouterr().out
    main(["data", "show", str(tmp_path / "documents-rows" / "train.jsonl")])
    assert "Topic" in capsys.readouterr().out


def test_wrong_words_get_one_line_with_the_nearest(run_file: Path, base_dir, capsys):
    assert "did you mean 'train'" in refused(capsys, "trian", "x.yaml")
    assert "did you mean '--resume'" in refused(capsys, "train", str(run_file), "--resum")
    assert "did you mean 'steps'" in refused(capsys, "train", str(run_file), "--train.stesp", "3")
    assert "did you mean '--lora.r'" in refused(capsys, "train", str(run_file), "--lorra.r", "3")
    assert "--prompt" in refused(capsys, "generate", "--model", str(base_dir), "--promt", "x")
    assert "--data" in refused(capsys, "evaluate", "--model", str(base_dir))
    rate = refused(capsys, "sweep", str(run_file), "--optimizer.learning-rate", "1e-3,1e-2")
    assert "did you mean '--train.learning-rate'" in rate
    assert "did you mean '--train.steps'" in refused(capsys, "train", str(run_file), "--steps", "3")
    assert "several values" in refused(capsys, "sweep", str(run_file), "--lora.r", "4")
    assert "value is missing" in refused(capsys, "train", str(run_file), "--lora.r")


def test_keys_may_stand_before_the_config(run_file: Path, capsys):
    main(["train", "--lora.r", "3", "--train.steps=5", str(run_file), "--dry-run"])
    out = capsys.readouterr().out
    assert re.search(r"2 of 2 +3 +64 -> 64", out) and "steps: 5" in out


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["merge", "--model", "a", "--adapter", "b", "--output", "c"], "none"),
        (
            ["evaluate", "--model", "a", "--data", "b"],
            "only --model.key, --quant.key, --data.key, --train.loss_chunk",
        ),
        (["data", "show", "stdlib"], "only --model.key, --data.key"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(capsys, words, taken):
    message = refused(capsys, *words, "--train.steps", "3")
    assert f"takes no --train.steps: of the config's keys, {taken}" in message


def test_bad_input_names_the_place_and_leaves_nothing(
    run_file: Path, base_dir: Path, tmp_path: Path, capsys
):
    output = tmp_path / "run"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    train = ("train", str(run_file))
    assert "broken.jsonl:2" in refused(capsys, *train, "--data.train", str(broken))
    assert "q_porj" in refused(capsys, *train, "--lora.target_modules", "[q_porj]")
    assert "no such" in refused(capsys, *train, "--model.path", str(tmp_path / "none"))
    assert "use_qalora" in refused(capsys, *train, "--lora.use_qalora", "true")
    assert not output.exists()


def test_a_pickle_is_never_opened(base_dir: Path, tmp_path: Path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04 not to be opened")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = ("merge", "--model", str(base_dir), "--adapter", str(adapter))
    assert "pickle" in refused(capsys, *words, "--output", str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(trained: Path, data_dir: Path, capsys):
    other = str(data_dir / "stories260K-hf")
    words = ("generate", "--model", other, "--adapter", str(trained / "adapter"), "--prompt", "a")
    assert "another base" in refused(capsys, *words)


def test_a_second_run_does_not_overwrite_the_first(trained: Path, capsys):
    capsys.readouterr()
    before = (trained / "metrics.jsonl").read_bytes()
    message = refused(capsys, "train", str(trained.parent / "run.yaml"))
    assert "nothing to resume" in message and "run-2" in message
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_has_nothing_left_to_do(trained: Path, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    (trained / "report.md").unlink()
    main(["train", "--resume", "auto", str(trained / "config.yaml")])
    assert "this run is finished; there is nothing left to do" in capsys.readouterr().out
    assert (trained / "report.md").exists()
    assert (trained / "metrics.jsonl").read_bytes() == before
    other = ("train", str(trained / "config.yaml"), "--resume", "auto", "--lora.r", "3")
    assert "was started with lora.r" in refused(capsys, *other)
    # Without `auto` the word that follows is the config.
    assert "finished" in refused(capsys, "train", "--resume", str(trained / "config.yaml"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_a_run_is_made_ready(run_file, capfd, monkeypatch, number, code):
    monkeypatch.setattr("lora_jax.train.prepare", lambda config: signal.raise_signal(number))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(run_file), "--resume", "auto"])
    assert stopped.value.code == code
    assert "before the first step from there; the same command goes on" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(run_file)])
    assert "nothing is saved yet; the same command starts again" in capfd.readouterr().err


def test_quickstart_refuses_what_it_cannot_compare(capsys):
    line = refused(capsys, "quickstart", "--data.eval", "rows.jsonl")
    assert "data.train must be stdlib and data.eval stdlib-heldout; use ./lora train" in line
    line = refused(capsys, "quickstart", "--train.method", "full", "--quant", "null")
    assert "use ./lora train for train.method full" in line


def test_merge_onto_a_file(base_dir: Path, rows_file: Path, capsys):
    words = ("--model", str(base_dir), "--adapter", "x", "--output", str(rows_file))
    assert f"{rows_file}: holds something already" in refused(capsys, "merge", *words)


def test_generate_goes_on_after_a_prompt_that_is_too_long(base_dir: Path, monkeypatch, capsys):
    lines = iter(["one " * 500, "one 1", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["generate", "--model", str(base_dir), "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    assert err.startswith("error: generate: prompt 0 has") and out


def test_ctrl_c_gets_one_line(monkeypatch, base_dir: Path, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", str(base_dir)])
    assert (stop.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


@pytest.mark.slow
def test_full_disk_gets_one_line_to_the_end_of_the_process(run_file: Path, tmp_path: Path):
    """No file may grow beyond 40 kB, which stops the first checkpoint half way."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from lora_jax.cli import main; main()"
    )
    words = ["train", str(run_file), "--train.save_every", "1", "--train.tensorboard", "true"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "cannot write" in run.stderr and not (tmp_path / "run" / "adapter").exists()


def test_quickstart_leaves_everything_and_takes_the_next_number(quickstart_run: Path):
    run = quickstart_run
    assert [p.name for p in (run.parent / "quickstart").iterdir()] == ["kept.txt"]
    assert {p.name for p in run.iterdir()} >= {
        "base", "adapter", "merged", "metrics.jsonl", "loss.png", "report.md", "config.yaml",
    }  # fmt: skip
    out = (run.parent / "said.txt").read_text()
    assert "before:" in out and "after:" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["merge"]["largest_difference"] < 1e-4
    fair = summary["fair"]
    assert fair["before"] == min(fair["instruction"], fair["natural"])
    assert np.isfinite(fair["after"])
