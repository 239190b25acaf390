"""A run from its config to what it leaves; how it diverges, stops, and meets a full disk."""

import dataclasses
import errno
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import combine
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import load_adapter
from lora_jax.data import eval_batches
from lora_jax.models import load_pretrained
from lora_jax.train import (
    Stopped,
    evaluate,
    job_batches,
    load_config,
    make_eval_step,
    next_directory,
    prepare,
    run,
    steps_of,
    train,
)
from lora_jax.train._metrics import MetricsLog


@pytest.fixture
def make_job(make_config):
    return lambda **sections: prepare(make_config(**sections))


def held_out_loss(job, trainable):
    batches = eval_batches(job.eval, batch_size=2, seq_length=job.config.data.max_length)
    return evaluate(make_eval_step(job.model), combine(job.base, trainable), batches).loss


def test_leaves_an_adapter_and_its_records(make_job, records, tmp_path):
    job = make_job(train={"eval_every": 3, "save_every": 4, "tensorboard": True})
    seen = []
    result = run(job, listener=seen.append)
    names = sorted(p.name for p in result.directory.iterdir())
    assert names == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "tensorboard",
    ]
    assert load_config(result.directory / "config.yaml") == job.config
    # What is written, what a listener sees, and the result say the same.
    written = records(result.directory)
    assert [set(r) & {"loss", "eval_loss"} for r in written] == [
        {key} for key in (["eval_loss", "loss", "loss", "eval_loss", "loss", "loss", "eval_loss"])
    ]
    assert [r["step"] for r in written] == [0, 2, 3, 3, 4, 6, 6]
    assert [r["eval_loss"] for r in seen if "eval_loss" in r] == [
        result.before.loss,
        written[3]["eval_loss"],
        result.after.loss,
    ]
    assert result.after.loss < result.before.loss and result.steps == 6
    saved, config = load_adapter(
        result.directory / "adapter", job.pretrained.params, layouts=job.layouts
    )
    assert config.r == job.config.lora.r
    jax.tree.map(np.testing.assert_array_equal, saved, result.trainable)
    np.testing.assert_allclose(held_out_loss(job, saved), result.after.loss, rtol=1e-6)


def test_counts_every_token_it_reads(make_job, records):
    job = make_job(train={"steps": None, "epochs": 1.5, "accumulate": 2})
    result = run(job)
    batches = job_batches(job)
    assert result.steps == steps_of(job.config, batches)
    read = sum(int((next(batches)["segment_ids"] > 0).sum()) for _ in range(2 * result.steps))
    assert [r for r in records(result.directory) if "loss" in r][-1]["tokens"] == read


def test_all_parameters_train_in_the_same_loop(make_job):
    job = make_job(train={"method": "full", "learning_rate": 3e-3, "steps": 3})
    before = jax.tree.map(np.asarray, job.trainable)  # the run takes over the arrays themselves
    result = run(job)
    assert result.after.loss < result.before.loss
    assert not (result.directory / "adapter").exists()
    model = load_pretrained(result.directory / "model")
    jax.tree.map(np.testing.assert_array_equal, model.params, result.trainable)
    assert model.tokenizer is not None
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, result.trainable)
    assert all(jax.tree.leaves(moved))


def test_rules_for_single_layers_reach_the_file(make_job):
    job = make_job(
        lora={
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.v_proj": 2, "q_proj": 3},
            "layers_to_transform": [1],
        }
    )
    result = run(job)
    assert job.counts()["trainable"] == 3 * (64 + 64) + 2 * (64 + 32)
    saved, _ = load_adapter(
        result.directory / "adapter", job.pretrained.params, layouts=job.layouts
    )
    jax.tree.map(np.testing.assert_array_equal, saved, result.trainable)
    attention = result.trainable["model"]["layers"]["self_attn"]
    assert attention["q_proj"]["lora_scaling"].tolist() == [0.0, pytest.approx(8 / 3)]
    assert attention["v_proj"]["lora_A"].shape == (2, 64, 2)
    assert not attention["q_proj"]["lora_B"][0].any() and attention["q_proj"]["lora_B"][1].all()


def test_float16_adapter(make_job):
    result = run(make_job(lora={"adapter_dtype": "float16"}, train={"steps": 12}))
    assert result.after.loss < result.before.loss - 0.5
    types = {x.dtype for x in jax.tree.leaves(result.trainable)}
    assert types == {jnp.dtype("float16"), jnp.dtype("float32")}  # the scalings


def test_stops_early_and_keeps_the_best(make_job, records):
    # Eight rows learnt by heart: the held-out loss falls, then rises.
    job = make_job(
        data={"train_rows": 10},
        train={
            "steps": 200,
            "eval_every": 4,
            "patience": 3,
            "learning_rate": 2e-2,
            "schedule": "constant",
        },
    )
    result = run(job)
    looks = {r["step"]: r["eval_loss"] for r in records(result.directory) if "eval_loss" in r}
    del looks[0]
    best = min(looks, key=lambda step: looks[step])
    assert result.stopped_early and result.steps == max(looks) == best + 3 * 4 < 200
    assert result.after.loss == looks[best]
    np.testing.assert_allclose(held_out_loss(job, result.trainable), looks[best], rtol=1e-6)
    saved, _ = load_adapter(
        result.directory / "adapter", job.pretrained.params, layouts=job.layouts
    )
    jax.tree.map(np.testing.assert_array_equal, saved, result.trainable)


def test_goes_on_from_an_adapter(make_job, data_dir):
    """From one that PEFT made, then from the one that this left."""
    model = {"path": str(data_dir / "stories260K-hf")}
    peft_made = str(data_dir / "peft_made" / "stories260K-hf__rank_alpha_pattern")
    job = make_job(model=model, train={"adapter": peft_made, "steps": 2})
    result = run(job)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), job.trainable, result.trainable)
    for path, has_moved in leaves_with_path(moved):
        assert has_moved == path.endswith(("lora_A", "lora_B")), path
    again = make_job(model=model, train={"adapter": str(result.directory / "adapter")})
    jax.tree.map(np.testing.assert_array_equal, again.trainable, result.trainable)
    assert again.config.lora == job.config.lora


class Poison:
    """A listener that spoils the base once a step is logged."""

    def __init__(self, job, step):
        self.job, self.step = job, step

    def __call__(self, record):
        if record["step"] == self.step and "loss" in record:
            self.job.base["model"]["norm"]["weight"] *= jnp.nan


def test_divergence_names_step_rows_and_checkpoint(make_job, message_of, rows_file):
    job = make_job(train={"steps": 6, "save_every": 2, "log_every": 1})
    whole = jax.tree.map(jnp.copy, job.base)
    found = message_of(run, job, listener=Poison(job, 3))
    directory = Path(job.config.output)
    assert f"{directory}: the loss" in found and "not finite at step 4 (rows " in found
    assert "the checkpoint of step 2 is kept; look at these rows, or go on with --resume" in found
    batches = job_batches(job)
    rows = [next(batches)["rows"] for _ in range(4)][-1]
    lines = [f"{rows_file}:{row + 1}" for row in np.unique(rows) if row >= 0]
    assert ", ".join(lines[:6]) in found
    assert not (directory / "adapter").exists()
    # Mended, the run goes on from the checkpoint, at a lower rate if need be.
    lower = dataclasses.replace(job.config.train, learning_rate=5e-3)
    config = dataclasses.replace(job.config, train=lower)
    result = run(dataclasses.replace(job, base=whole, config=config), resume=True)
    assert load_config(directory / "config.yaml").train.learning_rate == 5e-3
    assert result.steps == 6 and result.after.loss < result.before.loss


def test_divergence_at_once(make_job, message_of):
    job = make_job(train={"learning_rate": 1e30, "schedule": "constant"})
    found = message_of(run, job)
    assert "the update is not finite at step 1" in found and "nothing is saved yet" in found
    assert not (Path(job.config.output) / "adapter").exists()


def test_base_that_is_not_finite(make_job, message_of):
    job = make_job()
    job.base["model"]["norm"]["weight"] *= jnp.nan
    found = message_of(run, job)
    assert "after step 0: evaluate: the held-out loss is not finite; look at the weights" in found


def stopped_by(numbers, job, at, **options):
    """How a run ends that gets these signals while a record of step `at` is written."""
    handlers = [signal.getsignal(number) for number in numbers]

    def listener(record):
        if record["step"] == at:
            for number in numbers:
                signal.raise_signal(number)

    with pytest.raises(Stopped) as stopped:
        run(job, listener=listener, **options)
    assert [signal.getsignal(number) for number in numbers] == handlers
    return stopped.value


def test_interrupt_saves_and_says_how_to_go_on(make_job, capsys):
    job = make_job(train={"log_every": 1})
    stopped = stopped_by([signal.SIGINT], job, at=3)
    directory = Path(job.config.output)
    again = f"./lora train {directory / 'config.yaml'} --resume goes on"
    said = capsys.readouterr().err
    assert stopped.code == 130
    assert str(stopped) == f"{directory}: stopped and saved at step 3; {again}"
    assert "stopping after this step" in said and f"{stopped}\n" in said
    resumed = run(job, resume="auto")
    assert f"{directory}: going on from step 3\n" in capsys.readouterr().err
    other = dataclasses.replace(job.config, output=f"{job.config.output}-whole")
    whole = run(dataclasses.replace(job, config=other))
    jax.tree.map(np.testing.assert_array_equal, resumed.trainable, whole.trainable)


def test_termination_is_no_failure(make_job):
    job = make_job(train={"save_every": 4})
    directory = Path(job.config.output)
    stopped = stopped_by([signal.SIGTERM], job, at=0)
    assert stopped.code == 0 and "before the first step, so nothing is saved yet" in str(stopped)
    assert not any((directory / "checkpoints").iterdir())
    # At a step that is saved anyway, and where all is done.
    stopped = stopped_by([signal.SIGTERM], job, at=4, resume=True)
    assert stopped.code == 0 and "stopped and saved at step 4" in str(stopped)

    def listener(record):
        if "eval_loss" in record:
            signal.raise_signal(signal.SIGTERM)

    assert run(job, resume=True, listener=listener).steps == 6


def test_a_second_ctrl_c_interrupts_at_once(make_job):
    job = make_job(train={"log_every": 1, "save_every": 1})
    stopped = stopped_by([signal.SIGTERM, signal.SIGINT], job, at=2)
    assert stopped.code == 130 and "interrupted; ./lora train" in str(stopped)
    assert "--resume goes on from the newest" in str(stopped)
    # Schedulers send SIGTERM several times.
    stopped = stopped_by([signal.SIGTERM] * 3, job, at=4, resume=True)
    assert stopped.code == 0 and "stopped and saved at step 4" in str(stopped)
    assert run(job, resume=True).steps == 6


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_the_adapter(make_job, message_of, monkeypatch):
    job = make_job(train={"steps": 2})
    replace = os.replace

    def refuse(source, target):
        (full_disk if Path(target).name == "adapter" else replace)(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert message_of(run, job).endswith("cannot write: No space left on device")
    directory = Path(job.config.output)
    names = sorted(p.name for p in directory.iterdir())
    assert names == ["checkpoints", "config.yaml", "metrics.jsonl", "run.json"]
    monkeypatch.undo()
    assert run(job, resume=True).steps == 2
    assert (directory / "adapter" / "adapter_model.safetensors").exists()


def test_full_disk_at_the_records(make_job, message_of, monkeypatch):
    monkeypatch.setattr(MetricsLog, "__call__", full_disk)
    assert message_of(run, make_job()).endswith("run: cannot write: No space left on device")


def test_never_writes_over_anything(make_config, make_job, message_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    found = message_of(run, make_job())
    assert "holds something already; write to another directory" in found
    assert f"--output {tmp_path / 'run-2'}" in found
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    found = message_of(run, make_job(output=str(tmp_path / "file")))
    assert "holds something already" in found
    assert next_directory(tmp_path / "file") == tmp_path / "file-2"
    (tmp_path / "empty").mkdir()
    assert next_directory(tmp_path / "empty") == tmp_path / "empty"


def test_wrong_data_leaves_no_directory(make_config, message_of):
    config = make_config(data={"train": "nowhere.jsonl"})
    assert "nowhere.jsonl" in message_of(train, config)
    assert not Path(config.output).exists()
