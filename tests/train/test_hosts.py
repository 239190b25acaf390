"""Several processes that train one run: the same result, one set of files, one reason to end."""

import dataclasses
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import InputError, LoraConfig
from lora_jax.train import (
    DataSection,
    ModelSection,
    RunConfig,
    TrainSection,
    config_text,
    join_hosts,
    train,
)
from tests.train.processes import Processes, before_step

HOST = socket.gethostname()
STEPS = 40


@pytest.fixture(scope="module")
def config(base_dir, rows_file, tmp_path_factory) -> RunConfig:
    return RunConfig(
        model=ModelSection(path=str(base_dir), remat="everything"),
        data=DataSection(train=str(rows_file), max_length=48, eval_share=0.2),
        lora=LoraConfig(r=4, target_modules="all-linear"),
        train=TrainSection(
            steps=STEPS,
            batch_size=4,
            learning_rate=1e-3,
            log_every=1,
            save_every=10,
            heartbeat=5,
            tensorboard=False,
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


def fails_at_step_12(process: int) -> None:
    def act(at: int) -> None:
        if at == 12:
            raise InputError("rows.jsonl: no longer there")

    if process == 1:
        before_step(act)


def is_preempted_at_step_15(process: int) -> None:
    def act(at: int) -> None:
        if at == 15:
            signal.raise_signal(signal.SIGTERM)
        if at >= 15:
            time.sleep(0.1)

    if process == 1:
        before_step(act)


def test_one_fails_one_is_preempted_and_the_result_is_that_of_one_process(
    start, config, tmp_path, records
):
    """One run in three parts, each of two processes with two devices."""
    run = Path(config.output)
    failed = start("--resume", "auto", trouble=fails_at_step_12)
    assert failed.codes() == [2, 2], failed.said()
    assert failed.said()[0][-1] == f"error: process 1 of 2 ({HOST}): rows.jsonl: no longer there"
    assert failed.said()[1][-1:] == ["error: rows.jsonl: no longer there"]

    (tmp_path / "said").rename(tmp_path / "said-before")
    stopped = start("--resume", "auto", trouble=is_preempted_at_step_15)
    assert stopped.codes() == [0, 0], stopped.said()
    told = [line for lines in stopped.said() for line in lines if "going on from" in line]
    assert told == [f"{run}: going on from step 10"]
    told = [line for lines in stopped.said() for line in lines if "stopped and saved" in line]
    again = f"./lora train {run}/config.yaml --distributed --resume goes on"
    assert len(told) == 1 and told[0].endswith(again)

    (tmp_path / "said").rename(tmp_path / "said-then")
    whole = start("--resume", "auto")
    assert whole.codes() == [0, 0], whole.said()
    names = sorted(path.name for path in run.iterdir())
    assert names == [
        *("adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "report.md")
    ]
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
