"""A run that was cut off ends as if it had not been, byte for byte."""

import dataclasses
import os
from pathlib import Path

import pytest

from lora_jax.train import prepare, run


class Dies(Exception):
    """What cuts a run off here."""


def dies_at(step):
    def listener(record):
        if record["step"] == step and "loss" in record:
            raise Dies

    return listener


@pytest.fixture
def job(make_config):
    """Everything that a checkpoint must carry: dropout, accumulation, early stopping, a pace."""
    return prepare(
        make_config(
            lora={"lora_dropout": 0.2},
            train={
                "steps": 8,
                "accumulate": 2,
                "save_every": 3,
                "eval_every": 2,
                "patience": 5,
                "log_every": 2,
            },
        )
    )


def at(job, directory):
    return dataclasses.replace(job, config=dataclasses.replace(job.config, output=str(directory)))


def files(directory):
    return {p.name: p.read_bytes() for p in (directory / "adapter").iterdir()}


def assert_same_run(one, other, records):
    assert files(one) == files(other)
    assert records(one) == records(other)


@pytest.fixture
def uninterrupted(job, tmp_path):
    return run(at(job, tmp_path / "whole")).directory


def test_resumed_run_is_the_same(job, tmp_path, records, uninterrupted):
    with pytest.raises(Dies):
        run(job, listener=dies_at(6))
    directory = Path(job.config.output)
    assert records(directory)[-1]["step"] > 3  # beyond the checkpoint: to be dropped
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut off within a line
    # A checkpoint that was being written when the process died.
    half = directory / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    run(job, resume=True)
    assert_same_run(directory, uninterrupted, records)
    assert not half.exists()


def test_resumes_without_any_checkpoint(job, records, uninterrupted):
    with pytest.raises(Dies):
        run(job, listener=dies_at(2))
    run(job, resume=True)
    assert_same_run(Path(job.config.output), uninterrupted, records)


def test_resumes_between_the_last_checkpoint_and_the_adapter(
    job, records, uninterrupted, monkeypatch
):
    def die(*args):
        raise Dies

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr("lora_jax.train._save._save_adapter", die)
        run(job)
    result = run(job, resume=True)
    assert_same_run(result.directory, uninterrupted, records)
    assert result.before.loss > result.after.loss > 0


@pytest.mark.slow
def test_resumes_from_the_checkpoint_before_a_broken_one(job, records, uninterrupted, capsys):
    with pytest.raises(Dies):
        run(job, listener=dies_at(8))
    directory = Path(job.config.output)
    for file in (directory / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run(job, resume=True)
    assert f"{directory}: going on from step 3" in capsys.readouterr().err
    assert_same_run(directory, uninterrupted, records)
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["6", "6.broken", "8"]


def test_refuses_to_resume(job, message_of, tmp_path):
    assert "no run to resume here; leave --resume out" in message_of(run, job, resume=True)
    with pytest.raises(Dies):
        run(job, listener=dies_at(4))
    train = dataclasses.replace(job.config.train, beta2=0.5)
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, train=train))
    found = message_of(run, other, resume=True)
    assert "was started with train.beta2 0.999, now it is 0.5" in found
    changed = dataclasses.replace(job.train, examples=job.train.examples[:-1])
    found = message_of(run, dataclasses.replace(job, train=changed), resume=True)
    assert "the checkpoint was made with other rows" in found
    assert "holds another run" in message_of(run, job)
    # A finished run, under another name for the same directory.
    directory = os.path.relpath(job.config.output)
    run(at(job, directory), resume=True)
    assert "this run is finished" in message_of(run, job, resume=True)
