"""Several processes that train one run: the same result, one set of files, one reason to end."""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import InputError, LoraConfig
from lora_jax.train import (
    DataSection,
    ModelSection,
    RunConfig,
    TrainSection,
    _hosts,
    _job,
    _loop,
    config_text,
    join_hosts,
    train,
)
from tests.train.processes import Processes, before_step, free_port

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def config(base_dir, rows_file, tmp_path_factory) -> RunConfig:
    return RunConfig(
        model=ModelSection(path=str(base_dir), remat="everything"),
        data=DataSection(train=str(rows_file), max_length=48, eval_share=0.2),
        lora=LoraConfig(r=4, target_modules="all-linear"),
        train=TrainSection(
            steps=8,
            batch_size=4,
            learning_rate=1e-3,
            log_every=1,
            save_every=100,
            heartbeat=5,
            tensorboard=False,
            samples=0,
        ),
        output=str(tmp_path_factory.mktemp("hosts") / "run"),
    )


@pytest.fixture
def start(config, tmp_path):
    """Start processes on a config; each may get words of its own."""

    def start(*words: str, count: int = 2, own=None, trouble=None, **changes) -> Processes:
        file = tmp_path / "config.yaml"
        file.write_text(config_text(dataclasses.replace(config, **changes)))
        own = own or {}
        lines = [["train", str(file), *words, *own.get(i, [])] for i in range(count)]
        return Processes(lines, tmp_path / "said", devices=4 // count, trouble=trouble)

    return start


def fails(process: int) -> None:
    if process == 1:
        before_step(lambda at: no_rows() if at == 3 else None)


def no_rows(*_) -> None:
    raise InputError("rows.jsonl: no longer there")


def cannot_read(process: int) -> None:
    if process == 1:
        _job.rows_of = no_rows


def loses_a_held_out_row(process: int) -> None:
    read = _job.rows_of

    def fewer(*given):
        rows, held_out = read(*given)
        return rows, dataclasses.replace(held_out, rows=held_out.rows[1:])

    if process == 1:
        _job.rows_of = fewer


def lives_elsewhere(where: Path, process: int) -> None:
    _hosts._LAG = 0.2
    folder = where / f"host-{process}"
    folder.mkdir()
    os.chdir(folder)


def is_preempted_while_it_loads(process: int) -> None:
    def load(*_):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1000)

    if process == 1:
        _job.load_base = load


def hangs(process: int) -> None:
    if process == 1:
        _loop.BatchIterator.__next__ = lambda self: time.sleep(1000)


def is_preempted(process: int) -> None:
    def act(at: int) -> None:
        if at == 1:
            signal.raise_signal(signal.SIGTERM)
        if at >= 1:
            time.sleep(1)

    if process == 1:
        before_step(act)


def test_preempted_and_resumed_they_come_to_what_one_process_comes_to(
    start, config, tmp_path, records
):
    """One run in two parts, each of two processes with two devices."""
    run = Path(config.output)
    stopped = start("--resume", "auto", trouble=is_preempted)
    assert stopped.codes() == [0, 0], stopped.said()
    told = [line for lines in stopped.said() for line in lines if "stopped and saved" in line]
    again = f"./lora train {run}/config.yaml --distributed --resume goes on"
    assert len(told) == 1 and told[0].endswith(again)

    (tmp_path / "said").rename(tmp_path / "said-before")
    whole = start("--resume", "auto")
    assert whole.codes() == [0, 0], whole.said()
    assert f"{run}: going on from step" in whole.said()[0][0] and whole.said()[1] == []
    names = sorted(path.name for path in run.iterdir())
    assert names == [
        *("adapter", "checkpoints", "config.yaml", "deltas.png", "lengths.png", "loss.png"),
        *("metrics.jsonl", "progress.png", "report.html", "report.md", "run.json"),
    ]
    about = json.loads((run / "run.json").read_text())
    assert [start["machine"]["processes"] for start in about["starts"]] == [2, 2]
    assert [path for path in run.parent.iterdir() if path != run] == []

    alone = train(dataclasses.replace(config, output=str(tmp_path / "alone")))
    compare_adapters(run, alone.directory)
    for ours, theirs in zip(records(run), records(alone.directory), strict=True):
        assert ours == {k: pytest.approx(v, rel=1e-4) for k, v in theirs.items()}


def compare_adapters(found: Path, wanted: Path) -> None:
    """Each array to 1e-5 of its length."""
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, wanted_array in theirs.items():
        apart = np.linalg.norm(ours[name] - wanted_array) / np.linalg.norm(wanted_array)
        assert apart < 1e-5, name


def test_another_config_is_named_by_all(start, tmp_path):
    output = tmp_path / "other"
    processes = start(own={1: ["--train.batch_size", "8"]}, output=str(output))
    assert processes.codes() == [2, 2]
    line = (
        f"error: process 1 ({HOST}): train.batch_size is 8, process 0 has 4; start all processes"
        " with the same config"
    )
    assert processes.said() == [[line], [line]]
    assert not output.exists()


def test_other_held_out_rows_are_found(start, tmp_path):
    """Which no step would show, but the held-out loss of all."""
    processes = start(trouble=loses_a_held_out_row, output=str(tmp_path / "other"))
    assert processes.codes() == [2, 2], processes.said()
    for (line,) in processes.errors():
        assert line.startswith(f"error: process 1 ({HOST}): the digest of held-out rows is ")
        assert line.endswith("; give all the same files")


@pytest.mark.slow
def test_preempted_before_the_first_step_all_end_at_once(start, tmp_path):
    processes = start(trouble=is_preempted_while_it_loads, output=str(tmp_path / "early"))
    assert processes.codes() == [0, 0], processes.said()
    line = "stopped before the first step; the same command starts again"
    assert all(line in lines for lines in processes.said())


@pytest.mark.parametrize(
    "trouble", [cannot_read, pytest.param(fails, marks=pytest.mark.slow)], ids=["data", "step"]
)
def test_an_error_of_one_ends_all(start, trouble, tmp_path):
    processes = start(trouble=trouble, output=str(tmp_path / "failed"))
    assert processes.codes() == [2, 2], processes.said()
    error = "rows.jsonl: no longer there"
    by_others = f"error: process 1 of 2 ({HOST}): {error}"
    assert processes.errors() == [[by_others], [f"error: {error}"]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_who_dies_or_hangs_is_named(start, config, victim, number, tmp_path):
    run = tmp_path / "lost"
    endless = dataclasses.replace(config.train, steps=100_000, save_every=100_000)
    processes = start(train=endless, output=str(run))
    processes.wait_for(run / "metrics.jsonl", 5)
    before = time.monotonic()
    processes.send(number, victim)
    assert processes.codes(victim) == [1], processes.said()
    assert time.monotonic() - before < 3 * config.train.heartbeat
    (line,) = processes.errors()[1 - victim]
    assert line.startswith(f"error: process {victim} of 2 ({HOST}) has ")
    assert line.endswith(f"./lora train {run}/config.yaml --distributed --resume goes on")


@pytest.mark.slow
def test_who_hangs_in_its_own_work_is_named_and_not_who_waits(start, config, tmp_path):
    own = dataclasses.replace(config.train, heartbeat=1)
    processes = start(trouble=hangs, train=own, output=str(tmp_path / "hangs"))
    assert processes.codes() == [1, 1], processes.said()
    for (line,) in processes.errors():
        assert line.startswith(f"error: process 1 of 2 ({HOST}) has been reading its rows for")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_says_for_whom(process, tmp_path):
    address, python = f"127.0.0.1:{free_port()}", [sys.executable, "-c"]
    code = "from lora_jax.train import join_hosts; join_hosts(timeout=3).__enter__()"
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    own["JAX_PROCESS_ID"] = str(process)
    done = subprocess.run(
        [*python, code], env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True
    )
    problem = [f"not all 2 have come to {address}", f"no coordinator answers at {address}"]
    start = f"error: --distributed: process {process} of 2: {problem[process]}; start one process"
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
    assert done.returncode == 2


@pytest.mark.slow
def test_the_launcher_ends_as_its_processes_do():
    launch = [sys.executable, str(ROOT / "experiments/pods/launch.py"), "--processes", "2"]
    words = [*launch, "--", "train", "nowhere.yaml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    problem = "nowhere.yaml: cannot read: No such file or directory"
    assert done.returncode == 2
    assert {line[:3] for line in done.stdout.splitlines() if problem in line} == {"[0]", "[1]"}


@pytest.mark.slow
def test_four_processes_come_to_the_same(start, config, tmp_path):
    """From a start that moves the base, whose adapter is saved as what differs from it."""
    runs = [tmp_path / "four", tmp_path / "alone"]
    lora = dataclasses.replace(config.lora, init_lora_weights="pissa")
    processes = start(count=4, output=str(runs[0]), lora=lora)
    assert processes.codes() == [0] * 4, processes.said()
    train(dataclasses.replace(config, output=str(runs[1]), lora=lora))
    compare_adapters(*runs)


@pytest.mark.slow
def test_an_output_that_is_not_shared_is_refused(start, tmp_path):
    processes = start(trouble=functools.partial(lives_elsewhere, tmp_path), output="run")
    assert processes.codes() == [2, 2]
    line = (
        f"error: process 1 ({HOST}): process 0's file beside run is 'missing', process 0 has"
        " 'there'; output has to be a directory that all hosts share"
    )
    assert processes.errors() == [[line], [line]]
    assert not [path for host in tmp_path.glob("host-*") for path in host.iterdir()]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, "no cluster found, nor JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID;"),
        ({"ID": "2"}, "JAX_PROCESS_ID: must be from 0 to 1, as JAX_NUM_PROCESSES is 2, got 2"),
        ({"ID": "one"}, "JAX_PROCESS_ID: must be a number, got 'one'"),
        ({"ID": "1", "ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS: must be HOST:PORT, got 'here'"),
        ({"ID": "1"}, "process 1 of 2: JAX is in use already; join before anything is computed"),
    ],
)
def test_who_is_who_has_to_be_told(variables, problem, monkeypatch, message_of):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    if variables:
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", variables["ID"])
        address = variables.get("ADDRESS", "127.0.0.1:9")
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    jax.devices()
    assert problem in message_of(lambda: join_hosts(timeout=5).__enter__())
