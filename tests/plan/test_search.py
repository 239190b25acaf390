"""The least change that fits, on a machine whose arithmetic is known."""

import dataclasses

import pytest

from lora_jax import InputError
from lora_jax.plan import _search, parse_target, search, sweep
from lora_jax.plan._targets import Target

SAVINGS = {
    "--train.loss_chunk": 1,
    "--model.remat": {"nothing": 8, "offload": 9},
    "--train.batch_size": {"2": 4, "1": 6},
    "--train.accumulate": 0,
    "--train.optimizer": 1,
    "--quant.embedding": 1,
    "--quant.head": {"int8": 1, "nf4": 2},
    "--train.offload_optimizer": 2,
    "--data.max_length": {"1024": 5, "512": 7},
}
"""Gigabytes that each word of a change spares, of 40."""


def spared(words):
    total = 0
    for name, value in zip(words[::2], words[1::2], strict=True):
        saved = SAVINGS[name]
        total += saved[value] if isinstance(saved, dict) else saved
    return total


@pytest.fixture
def machine(monkeypatch, make_plan):
    """A function from a machine's gigabytes to what is found for it and all that was tried."""

    def find(limit, **run):
        device = dataclasses.replace(parse_target("rtx4090").device, memory=limit * 1e9)
        target, tried = Target("small", "cuda", device, 1), []

        def plan(config, target_name, words, *, at_most):
            assert at_most == limit * 1e9
            tried.append(tuple(words))
            return make_plan(run, target=target, total=(40 - spared(words)) * 10**9)

        monkeypatch.setattr(_search, "plan", plan)
        start = make_plan(run, target=target, total=40 * 10**9)
        found = search("x.yaml", "small", [], start)
        return None if found is None else found[0], tried

    return find


def test_the_first_single_change_that_is_enough(machine):
    assert machine(39)[0] == ("--train.loss_chunk", "128")
    assert machine(32)[0] == ("--model.remat", "nothing")
    assert machine(34, remat="nothing")[0] == (
        "--train.batch_size", "1", "--train.accumulate", "4",
    )  # fmt: skip
    assert machine(31)[0] == ("--model.remat", "offload")


def test_several_changes_when_one_is_not_enough(machine):
    words, asked = machine(28)
    assert spared(words) >= 12
    assert words[:2] == ("--model.remat", "nothing") and "--train.batch_size" in words
    # Each is needed: without it the run would not fit.
    pairs = list(zip(words[::2], words[1::2], strict=True))
    for pair in pairs:
        if pair[0] != "--train.accumulate":
            assert spared([x for other in pairs if other != pair for x in other]) < 12
    assert len(asked) < 25


def test_nothing_helps(machine):
    assert machine(5)[0] is None


def test_what_is_small_already_is_not_made_smaller(machine):
    run = {
        "loss_chunk": 128, "remat": "offload", "batch_size": 1, "optimizer": "adamw_8bit",
        "offload_optimizer": True, "max_length": 512,
        "quant": {"format": "nf4", "embedding": "nf4", "head": "nf4", "stored": False},
    }  # fmt: skip
    assert machine(39, **run) == (None, [])


def test_what_a_run_cannot_have_is_passed_over(monkeypatch, make_plan):
    def plan(config, target, words, *, at_most):
        if "--model.remat" in words:
            raise InputError("no such thing here")
        return make_plan(total=23 * 10**9 if "--train.batch_size" in words else 30 * 10**9)

    monkeypatch.setattr(_search, "plan", plan)
    words, _ = search("x.yaml", "rtx4090", [], make_plan(total=30 * 10**9))
    assert words == ("--train.batch_size", "2", "--train.accumulate", "2")


def test_what_makes_it_worse_is_left_out(monkeypatch, make_plan):
    """Each change alone is too little; one of them costs more than it spares."""
    cost = {"--train.optimizer": 2, "--model.remat": -1, "--train.batch_size": -4}
    cost |= {"--data.max_length": -3}

    def plan(config, target, words, *, at_most):
        return make_plan(total=(30 + sum(cost.get(word, 0) for word in words)) * 10**9)

    monkeypatch.setattr(_search, "plan", plan)
    words, found = search("x.yaml", "rtx4090", [], make_plan(total=30 * 10**9))
    assert found.fits and "--train.optimizer" not in words


def test_what_a_checkpoint_has_in_four_bits_stays_so(make_plan):
    stored = {"format": "nf4", "embedding": None, "head": None, "stored": True}
    words = list(_search.changes(make_plan({"quant": stored})))
    assert not any(name.startswith("--quant") for change in words for name in change)


def test_a_cpu_has_no_other_memory(make_plan):
    words = list(_search.changes(make_plan(target=parse_target("cpu"))))
    assert not any("offload" in word for change in words for word in change)


def test_changes_that_make_a_dense_base_small(make_plan):
    words = list(_search.changes(make_plan({"quant": None, "dtype": "float32"})))
    assert ("--model.dtype", "bfloat16") in words
    first = words.index(("--quant.format", "nf4"))
    assert words[first + 1] == (
        "--quant.format", "nf4", "--quant.embedding", "int8", "--quant.head", "int8",
    )  # fmt: skip
    # A base that is trained itself stays dense.
    full = list(_search.changes(make_plan({"quant": None, "method": "full"})))
    assert not any(name.startswith("--quant") for words in full for name in words)


def test_sweep_asks_for_every_pair(monkeypatch, make_plan):
    def plan(config, target, words):
        given = dict(zip(words[::2], words[1::2], strict=True))
        batch = int(given.get("--train.batch_size", 4))
        seq = int(given.get("--data.max_length", 256))
        if seq > 2048:
            raise InputError("data.max_length: 4096 exceeds the model's")
        return make_plan({"batch_size": batch, "max_length": seq}, total=batch * seq)

    monkeypatch.setattr(_search, "plan", plan)
    plans = sweep("x.yaml", "rtx4090", ["--lora.r", "4"], "batch=1:3,seq=512")
    assert [p.total for p in plans] == [512, 1536]
    # What the model has no positions for is left out, unless nothing else is asked for.
    assert len(sweep("x.yaml", "rtx4090", [], "batch,seq")) == 12
    with pytest.raises(InputError, match="4096 exceeds"):
        sweep("x.yaml", "rtx4090", [], "seq=4096")
    assert len(sweep("x.yaml", "rtx4090", [], "seq=512:1024")) == 2
    for axes in ("rows", "batch=", "batch=0", "batch=1;2", "", "seq=512:"):
        with pytest.raises(InputError, match="is no axis; give batch,seq"):
            sweep("x.yaml", "rtx4090", [], axes)
