"""Plans against the process that runs the same config, what is kept, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_jax import InputError
from lora_jax.plan import OWNERS, plan
from lora_jax.train import job_batches, load_config, make_program, prepare


@pytest.fixture
def no_child_after(monkeypatch):
    """A function after which whoever starts a process fails."""

    def refuse(*args, **options):
        raise AssertionError("a process was started")

    return lambda: monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture
def no_child(no_child_after):
    no_child_after()


def own_memory(config):
    """What the step of a run takes by XLA's account, compiled for the arrays that it trains."""
    job = prepare(config)
    step, init = make_program(job, config.train.steps)
    parts = [next(job_batches(job)) for _ in range(config.train.accumulate)]
    batch = {name: np.stack([p[name] for p in parts]) for name in parts[0] if name != "rows"}
    memory = step.lower(init(job.trainable), job.base, batch).compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.parametrize(
    "words",
    [
        ["--quant.format", "int8"],
        pytest.param(["--train.accumulate", "3"], marks=pytest.mark.slow),
        pytest.param(
            ["--quant", "null", "--model.remat", "dots", "--train.optimizer", "adamw_8bit"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--quant", "null", "--train.method", "full"], marks=pytest.mark.slow),
    ],
)
def test_it_is_what_the_process_takes(run_file, rows_file, no_child_after, words):
    made = plan(run_file, "cpu", words)
    config = load_config(run_file, [*words, "--data.train", str(rows_file)])
    arguments, temporaries = own_memory(config)
    assert made.total == pytest.approx(arguments + temporaries, rel=0.01)
    of_step = sum(made.owners[x] for x in ("gradients", "activations", "temporaries"))
    assert of_step == pytest.approx(temporaries, rel=0.01)
    assert sum(made.owners.values()) == made.total and tuple(made.owners) == OWNERS
    assert made.fits and made.bounds == {} and made.collectives == []
    # The input of each of two layers, for 48 tokens of two rows.
    assert made.owners["activations"] >= 2 * 2 * 48 * 64 * 4
    counts = prepare(config).counts()
    assert made.model["trainable"] == counts["trainable"]
    weights = counts["trainable_bytes" if config.train.method == "full" else "frozen_bytes"]
    assert made.owners["base"] + made.owners["scales"] == weights

    no_child_after()
    again = plan(run_file, "cpu", words)
    assert again == made
    plain = json.loads(json.dumps(again.to_json()))
    assert plain["total"] == made.total and plain["target"] == "cpu" and plain["fits"]


def test_a_changed_model_is_compiled_anew(run_file, base_dir, tmp_path, no_child_after):
    """As is another config, another place, or another version of a compiler."""
    mine = tmp_path / "model"
    mine.mkdir()
    shutil.copy(base_dir / "config.json", mine)
    words = ["--model.path", str(mine), "--train.method", "full", "--quant", "null"]
    made = plan(run_file, "cpu", words)
    assert made.owners["adapter"] == made.owners["scales"] == 0
    assert made.model["parameters"] == made.model["trainable"]
    assert made.owners["optimizer"] >= 2 * made.owners["base"]

    no_child_after()
    assert plan(run_file, "cpu", words) == made
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(AssertionError, match="a process was started"):
        plan(run_file, "cpu", words)
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="a process was started"):
        plan(run_file, "cpu", [*words, "--train.batch_size", "3"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.path", "nowhere"], "nowhere: no such directory"),
        (["--data.max_length", "4096"], "max_position_embeddings"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(run_file, words, message):
    with pytest.raises(InputError, match=message) as error:
        plan(run_file, "cpu", words)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_config(run_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/config\.json: no such file"):
        plan(run_file, "cpu", ["--model.path", str(tmp_path / "empty")])


def test_a_config_that_cannot_be_read(tmp_path, no_child):
    with pytest.raises(InputError, match="cannot read: No such file"):
        plan(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="not a text in UTF-8"):
        plan(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="unknown 'gtx'"):
        plan(tmp_path / "x.yaml", "gtx")


@pytest.mark.parametrize(
    "target, module, extra",
    [("v5e:2x2", "libtpu", "plan-tpu"), ("h200", "jax_plugins.xla_cuda13", "plan-gpu")],
)
def test_a_missing_compiler_is_named(run_file, monkeypatch, no_child, target, module, extra):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *x: None if name == module else find(name, *x)
    )
    with pytest.raises(InputError, match=rf"{target} needs a compiler .* \./lora install {extra}"):
        plan(run_file, target)


@pytest.mark.parametrize(
    "body, message",
    [
        ("echo something; echo 'F0 check failed: x > 0' >&2; kill -ABRT $$",
         "ended by SIGABRT: F0 check failed: x > 0"),
        ("exit 3", "ended with exit status 3: nothing said"),
    ],
)  # fmt: skip
def test_a_compiler_that_ends_its_process(run_file, monkeypatch, tmp_path, cache, body, message):
    """It is an error of one line, and nothing is kept of it."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat > /dev/null\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match=message):
        plan(run_file, "cpu")
    assert not cache.exists()


def test_a_cache_that_cannot_be_used_is_none(run_file, monkeypatch, make_plan, cache):
    """Neither a broken entry nor a place that cannot be written to is an error."""
    import lora_jax.plan._plan as module

    made = {
        "compiled": {"arguments": 10, "temporaries": 5, "total": 15, "host": 0, "traffic": 7,
                     "collectives": []},
        "owners": {"base": 8, "scales": 1, "adapter": 1, "optimizer": 0, "gradients": 9,
                   "activations": 2},
        "model": {}, "run": {}, "flops": {}, "kept_on_host": 0, "versions": {}, "seconds": 1.0,
        "files": [],
    }  # fmt: skip
    monkeypatch.setattr(module, "_compile", lambda *x: json.loads(json.dumps(made)))
    first = plan(run_file, "cpu")
    # Parts never exceed what the compiler counts: gradients it has optimized away are not there.
    assert first.owners["gradients"] == 5 and first.owners["temporaries"] == 0
    (entry,) = (cache / "lora_jax" / "plans").iterdir()
    for text in ("", "{}", "[]", '{"files": 3}', entry.read_text()[:-9]):
        entry.write_text(text)
        assert plan(run_file, "cpu") == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_file))
    assert plan(run_file, "cpu") == first


def test_a_config_that_is_no_file(run_file, monkeypatch):
    """A `RunConfig` is asked for by its text."""
    import lora_jax.plan._plan as module

    config = load_config(run_file)
    text, where = module._text(config)
    assert where == "config" and "nowhere.jsonl" in text
    (Path(run_file).parent / "again.yaml").write_text(text)
    assert load_config(Path(run_file).parent / "again.yaml") == config


def test_bounds_are_a_roofline(make_plan):
    made = make_plan()
    device = made.target.device
    assert made.bounds == {"compute": 1e14 / device.bf16, "memory": 1e11 / device.bandwidth}
    both = make_plan(flops={"bfloat16": 10**14, "float32": 10**14})
    assert both.bounds["compute"] == 1e14 / device.bf16 + 1e14 / device.f32
    cut = make_plan(collectives=[{"kind": "all-gather", "count": 2, "bytes": 8, "received": 6e9}])
    assert cut.bounds["links"] == 6e9 / device.link
    assert not make_plan(total=10**12).fits and not make_plan(refused="too large").fits
