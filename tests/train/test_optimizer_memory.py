"""Runs whose optimizer keeps 8 bits, or keeps its state in host memory, or both."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.train import prepare, run
from lora_jax.train._loop import _Loop


class Dies(Exception):
    """What cuts a run off here."""


def dies(record):
    if record["step"] == 4 and "loss" in record:
        raise Dies


@pytest.fixture
def make_job(make_config):
    def make(**train):
        plain = {"steps": 5, "save_every": 2, "log_every": 1, "eval_every": 5}
        # A rank at which every stacked factor has 4,096 elements or more.
        return prepare(make_config(lora={"r": 32}, train={**plain, **train}))

    return make


def at(job, directory):
    return dataclasses.replace(job, config=dataclasses.replace(job.config, output=str(directory)))


def weights(directory):
    return {p.name: p.read_bytes() for p in (directory / "adapter").iterdir()}


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"optimizer": "adamw_8bit"}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "adamw_8bit", "offload_optimizer": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["8 bits", "8 bits on the host"],
)
def test_resumed_run_is_the_same(make_job, tmp_path, records, train):
    job = make_job(**train)
    whole = run(at(job, tmp_path / "whole"))
    assert whole.after.loss < 0.9 * whole.before.loss
    with pytest.raises(Dies):
        run(job, listener=dies)
    resumed = run(job, resume=True)
    assert weights(resumed.directory) == weights(whole.directory)
    assert records(resumed.directory) == records(whole.directory)


@pytest.mark.slow
def test_host_memory_changes_nothing_and_may_be_chosen_on_resuming(make_job, tmp_path, records):
    job, on_host = make_job(), make_job(offload_optimizer=True)
    device, host = (
        run(at(j, tmp_path / n)).directory for j, n in ((job, "device"), (on_host, "host"))
    )
    assert records(host) == records(device)
    with pytest.raises(Dies):
        run(job, listener=dies)
    run(on_host, resume=True)
    for directory in (host, Path(job.config.output)):
        assert weights(directory) == weights(device)


def test_state_stays_on_the_host_and_the_step_compiles_once(make_job):
    loop = _Loop(make_job(optimizer="adamw_8bit", offload_optimizer=True), None)
    for i in range(2):
        loop._one_step(i)
    arrays = [leaf for leaf in jax.tree.leaves(loop.state.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in arrays} == {"pinned_host"}
    assert {leaf.dtype for leaf in arrays} == {np.dtype("uint8"), np.dtype("float32")}
    trained = jax.tree.leaves(loop.state.trainable)
    assert {leaf.sharding.memory_kind for leaf in trained} == {"device"}
    assert loop.step._cache_size() == 1  # type: ignore[attr-defined]
