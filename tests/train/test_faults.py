"""Runs killed at any moment and started again with `--resume auto` end as if never killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import cli
from lora_jax.train import MeshSection, config_text, prepare, run, train
from lora_jax.train._rundir import open_directory

# Children are forked off a process that has imported JAX and started none of its threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lora_jax.train", "grain", "orbax.checkpoint"])


def start(config):
    process = PROCESSES.Process(target=train, args=(config,), kwargs={"resume": "auto"})
    process.start()
    return process


def to_its_end(config):
    process = start(config)
    process.join(timeout=240)
    assert process.exitcode == 0


def last_step(directory):
    """The last step that a run has recorded so far."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=-1)


def signal_at(process, number, directory, step, delay):
    """Send a process a signal, so long after it has come to a step; what it exited with."""
    while last_step(directory) < step and process.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode


def killed_often(config, kills, draw):
    """Run it to its end, which takes so many kills."""
    directory = Path(config.output)
    for i in range(kills):
        # The first of many while it gets ready.
        step = last_step(directory) + draw.randint(1, 5) if i or kills == 1 else -1
        met = signal_at(start(config), signal.SIGKILL, directory, step, draw.uniform(0, 0.12))
        assert met == -signal.SIGKILL
    to_its_end(config)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 20])
def test_killed_at_any_moment(make_config, records, tmp_path, kills):
    steps = 12 * kills
    config = make_config(
        lora={"lora_dropout": 0.2},
        train={"steps": steps, "save_every": 3, "eval_every": 4, "log_every": 1, "patience": 99},
    )
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    to_its_end(whole)  # first, so that nobody is killed while a program goes to the cache
    killed_often(config, kills, random.Random(kills))
    directory, other = Path(config.output), Path(whole.output)
    assert adapter(directory) == adapter(other)
    assert records(directory) == records(other)
    assert [r["step"] for r in records(directory) if "loss" in r] == list(range(1, steps + 1))
    left = sorted(path.name for path in directory.iterdir())
    assert left == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl"]
    saved = sorted(int(path.name) for path in (directory / "checkpoints").iterdir())
    assert saved == [steps - 3, steps]


def adapter(directory):
    return {path.name: path.read_bytes() for path in (directory / "adapter").iterdir()}


@pytest.mark.slow
def test_preempted_again_and_again(make_config, records, tmp_path):
    """The whole command, whatever it is doing when SIGTERM comes."""
    config = make_config(
        train={"steps": 120, "save_every": 10, "eval_every": 4, "log_every": 1},
    )
    (tmp_path / "run.yaml").write_text(config_text(config))
    directory, draw = Path(config.output), random.Random(0)
    words = ["train", str(tmp_path / "run.yaml"), "--resume", "auto"]
    for i in range(6):
        process = PROCESSES.Process(target=cli.main, args=(words,))
        process.start()
        step, delay = last_step(directory) + draw.randint(1, 8), draw.uniform(0, 0.1)
        # The first while it gets ready.
        place = (step, delay) if i else (-1, 0.3)
        assert signal_at(process, signal.SIGTERM, directory, *place) == 0
    to_its_end(config)
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    to_its_end(whole)
    assert adapter(directory) == adapter(Path(whole.output))
    assert records(directory) == records(Path(whole.output))


def train_on(devices, config):
    jax.config.update("jax_num_cpu_devices", devices)
    train(config, resume="auto")


@pytest.mark.slow
def test_goes_on_with_other_devices(make_config, records, tmp_path):
    """From one to four, cut both ways, to two."""
    config = make_config(
        train={"steps": 30, "batch_size": 4, "save_every": 3, "eval_every": 5, "log_every": 1}
    )
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    to_its_end(whole)
    for devices, mesh, until in ((1, {}, 8), (4, {"fsdp": 2}, 16), (2, {}, None)):
        on = dataclasses.replace(config, mesh=MeshSection(**mesh))
        process = PROCESSES.Process(target=train_on, args=(devices, on))
        process.start()
        if until is not None:
            signal_at(process, signal.SIGKILL, Path(config.output), until, 0)
        process.join()
    assert process.exitcode == 0
    directory, other = Path(config.output), Path(whole.output)
    found, expected = (
        load_file(d / "adapter/adapter_model.safetensors") for d in (directory, other)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = np.abs(found[name] - tensor).max()
        assert error <= 1e-5 * np.abs(tensor).max(), name
    for one, same in zip(records(directory), records(other), strict=True):
        assert one == pytest.approx(same, rel=1e-5)


@contextlib.contextmanager
def files_of_at_most(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_finds_no_room(make_config, message_of, capsys):
    """What was saved before stays good."""
    job = prepare(make_config(train={"save_every": 2, "log_every": 1}))
    with contextlib.ExitStack() as limits:

        def listener(record):
            if record["step"] == 3:
                limits.enter_context(files_of_at_most(8192))

        found = message_of(run, job, listener=listener)
    assert "checkpoints: cannot write: " in found and "File too large" in found
    assert run(job, resume="auto").steps == 6
    assert f"{job.config.output}: going on from step 2\n" in capsys.readouterr().err
    saved = sorted(path.name for path in (Path(job.config.output) / "checkpoints").iterdir())
    assert saved == ["4", "6"]


def test_a_directory_belongs_to_one_process(make_config, message_of):
    config = make_config()

    def enter(resume):
        with open_directory(config, resume) as opened:
            return opened

    with open_directory(config, False) as opened:
        assert not opened.begun
        found = message_of(enter, "auto")
        assert f"{config.output}: another process is training here (process " in found
        assert "holds another run" in message_of(enter, False)
    assert enter("auto").begun
    assert [path.name for path in Path(config.output).iterdir()] == ["config.yaml"]


def test_what_a_killed_process_left_is_no_obstacle(make_config, message_of):
    config = make_config()
    directory = Path(config.output)
    half = directory / ".adapter.0123456789ab"
    half.mkdir(parents=True)
    (half / "adapter_config.json").write_text("{")
    (directory / ".config.yaml.ba9876543210").write_text("da")
    (directory / ".lock").write_text("process 1 on a machine that is gone\n")
    with open_directory(config, "auto") as opened:
        assert not opened.begun
    assert [path.name for path in directory.iterdir()] == ["config.yaml"]
    (directory / "config.yaml").unlink()
    (directory / "notes.txt").write_text("mine")
    assert "holds something already" in message_of(open_directory(config, "auto").__enter__)
    assert (directory / "notes.txt").exists()
