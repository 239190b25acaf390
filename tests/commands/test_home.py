"""What is shown without a command: the runs that are there, and what goes on from them."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lora_jax.cli import main
from lora_jax.commands import parsers


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(directory: Path, losses: list[float], *parts: str, age: float = 0, **train) -> Path:
    """A run's directory as far as it is looked at."""
    for part in (".", *parts):
        (directory / part).mkdir(parents=True, exist_ok=True)
    config = {"model": {"path": "bundled"}, "train": {"patience": None, **train}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = directory / "metrics.jsonl"
    lines = [json.dumps({"step": 10 * i, "eval_loss": loss}) for i, loss in enumerate(losses)]
    metrics.write_text("\n".join([*lines, '{"step": 99, "lo']))  # cut off
    os.utime(metrics, (time.time() - age, time.time() - age))
    return directory


def shown(capsys) -> str:
    main([])
    return capsys.readouterr().out


def test_nothing_yet(folder, capsys):
    (folder / "runs").mkdir()
    out = shown(capsys)
    assert "No runs here yet" in out and "\n  ./lora quickstart\n" in out


def test_a_finished_run_and_what_can_be_done_with_it(folder, capsys):
    write_run(folder / "runs/my run", [3.0, 2.5, 2.0], "adapter")
    out = shown(capsys)
    assert "runs/my run: finished, held-out loss 3.0000 → 2.0000" in out
    assert "  ./lora evaluate 'runs/my run'\n" in out
    assert "  ./lora chat bundled --adapter 'runs/my run/adapter'\n" in out
    assert "./lora merge --model bundled --adapter 'runs/my run/adapter' --output" in out
    parser, _ = parsers()
    for line in out.splitlines():
        if line.startswith("  ./lora "):
            parser.parse_args(shlex.split(line)[1:])


def test_the_newest_come_first(folder, capsys):
    for i in range(5):
        write_run(folder / f"runs/r{i}", [3.0, 2.0], "adapter", age=100.0 * i)
    write_run(folder / "elsewhere", [3.0, 2.0], "model", age=50.0)
    out = shown(capsys)
    assert [line.split(":")[0] for line in out.splitlines() if ": finished" in line] == [
        "runs/r0", "elsewhere", "runs/r1",
    ]  # fmt: skip
    assert "./lora chat bundled --adapter runs/r0/adapter" in out


def test_a_stopped_run_names_what_resumes_it(folder, capsys):
    write_run(folder / "runs/half", [3.0], "checkpoints/10", "checkpoints/9", "checkpoints/tmp")
    out = shown(capsys)
    assert "runs/half: stopped, saved at step 10\n" in out
    assert "  ./lora train runs/half/config.yaml --resume\n" in out


def test_a_run_under_way(folder, capsys):
    directory = write_run(folder / "runs/busy", [3.0, 2.0])
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "runs/busy: training, at step 10" in shown(capsys)


def test_the_best_is_told_where_it_was_kept(folder, capsys):
    write_run(folder / "runs/patient", [3.0, 1.5, 2.0], "adapter", patience=1)
    assert "3.0000 → 1.5000" in shown(capsys)


def test_a_sweep(folder, capsys):
    write_run(folder / "runs/grid/best", [], "adapter")
    records = [{"loss": 2.0}, {"loss": None}, {"loss": 1.25}]
    (folder / "runs/grid/sweep.jsonl").write_text("\n".join(map(json.dumps, records)))
    out = shown(capsys)
    assert "runs/grid: a sweep of 3 adapters, the best held-out loss 1.2500" in out
    assert "./lora chat bundled --adapter runs/grid/best/adapter" in out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b"{"),
        ("config.yaml", b"- 1"),
        ("config.yaml", b"\xff"),
        ("config.yaml", b"model: 3\ntrain: 4"),
        ("metrics.jsonl", b"[]\n3\nnull"),
        ("metrics.jsonl", b"\xff\x00"),
        ("metrics.jsonl", b'{"eval_loss": "x"}\n' * 2),
        ("metrics.jsonl", b'{"eval_loss": null}\n' * 2),
        ("metrics.jsonl", b"[" * 100_000),
    ],
)
def test_broken_files_hide_their_run(folder, capsys, file, content):
    write_run(folder / "runs/good", [3.0, 2.0], "adapter", age=9.0)
    (write_run(folder / "runs/bad", [3.0, 2.0], "adapter") / file).write_bytes(content)
    out = shown(capsys)
    assert "runs/good: finished" in out and "runs/bad" not in out


def test_it_starts_without_jax(folder):
    code = "from lora_jax.cli import main; main([]); import sys; print('jax' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.endswith("False\n")
