"""Runs killed at any moment and started again with `--resume auto` end as if never killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from lora_jax import cli
from lora_jax.train import config_text, prepare, run, train
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


def kill(process, directory, step, delay):
    """End a process without warning, so long after it has come to a step."""
    while last_step(directory) < step and process.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def killed_often(config, kills, draw):
    """Run it to its end; how many kills it met on the way."""
    directory, met = Path(config.output), 0
    for i in range(kills):
        process = start(config)
        # The first while it gets ready.
        step = last_step(directory) + draw.randint(1, 5) if i else -1
        met += kill(process, directory, step, draw.uniform(0, 0.12))
    to_its_end(config)
    return met


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(make_config, records, tmp_path, kills):
    steps = 6 * kills
    config = make_config(
        lora={"lora_dropout": 0.2},
        train={"steps": steps, "save_every": 3, "eval_every": 4, "log_every": 1, "patience": 99},
    )
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    to_its_end(whole)  # first, so that nobody is killed while a program goes to the cache
    assert killed_often(config, kills, random.Random(kills)) == kills
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
        train={"steps": 40, "save_every": 10, "eval_every": 4, "log_every": 1},
    )
    (tmp_path / "run.yaml").write_text(config_text(config))
    directory, stops, draw = Path(config.output), 0, random.Random(0)
    while not (directory / "adapter").exists():
        words = ["train", str(tmp_path / "run.yaml"), "--resume", "auto"]
        process = PROCESSES.Process(target=cli.main, args=(words,))
        process.start()
        step = last_step(directory) + draw.randint(1, 8) if stops else -1
        while last_step(directory) < step and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.1, 1.0) if stops else 0.3)
        process.terminate()
        process.join()
        assert process.exitcode == 0
        stops += 1
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    to_its_end(whole)
    assert stops > 3 and adapter(directory) == adapter(Path(whole.output))
    assert records(directory) == records(Path(whole.output))


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
