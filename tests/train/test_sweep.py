"""A grid of adapters: its words, its steps, what it leaves."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import yaml

from lora_jax import InputError
from lora_jax.adapters import read_config
from lora_jax.train import config_text, grid, load_config, run, sweep
from lora_jax.train._job import prepare, prepare_beside
from lora_jax.train._sweep import batches_of_members, rank_bucket, split_grid


@pytest.fixture
def run_file(make_config, tmp_path):
    config = make_config(lora={"target_modules": ["down_proj"]}, train={"steps": 2})
    path = tmp_path / "run.yaml"
    path.write_text(config_text(dataclasses.replace(config, output=str(tmp_path / "sweep"))))
    return path


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("1,2, 4", ["1", "2", "4"]),
        ("[q_proj,v_proj]", []),
        ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ("{a: 1, b: 2},{a: 2}", ["{a: 1, b: 2}", "{a: 2}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("4,4", ["4"]),
    ],
)
def test_values_stand_between_commas(value, parts):
    _, several = split_grid(["--lora.x", value])
    assert [part for choices in several for _, part in choices] == parts


def test_a_grid_is_every_combination(run_file):
    words = ["--lora.r", "1,8", "--train.learning-rate=1e-3,1e-2", "--train.steps", "7"]
    members = grid(run_file, words)
    assert [tuple(m.varied.values()) for m in members] == [
        (1, 1e-3), (1, 1e-2), (8, 1e-3), (8, 1e-2)
    ]  # fmt: skip
    assert {m.config.train.steps for m in members} == {7}
    assert [m.config.lora.r for m in members] == [1, 1, 8, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a key several values"),
        (["--lora.r", "4"], "give a key several values"),
        (["--lora.r"], "--lora.r: the value is missing"),
        (["--lora.r", "1,2", "--lora.r", "3,4"], "--lora.r is given twice"),
        (["--lora.r", "1,x"], "the rank r must be a positive integer"),
        (["--output", "a,b"], "all results go to one directory"),
        (["--train.method", "lora,full"], "train.method must be lora"),
        (["--lora.rr", "1,2"], "unknown field 'rr'"),
    ],
)
def test_what_is_no_grid_is_refused(run_file, message_of, words, said):
    assert said in message_of(grid, run_file, words)


def groups(run_file, words, at_once=8):
    found = batches_of_members(grid(run_file, words), at_once)
    return [[tuple(m.varied.values()) for m in group] for group in found]


def test_one_step_takes_what_shares_the_base_and_the_shape_of_a_step(run_file):
    assert groups(run_file, ["--lora.r", "1,16,17"]) == [[(1,), (16,)], [(17,)]]
    assert groups(run_file, ["--lora.lora_alpha", "1,2,3"], 2) == [[(1,), (2,)], [(3,)]]
    assert groups(run_file, ["--train.seed", "0,1"]) == [[(0,), (1,)]]
    assert groups(run_file, ["--train.batch_size", "1,2"]) == [[(1,)], [(2,)]]
    assert groups(run_file, ["--lora.target_modules", "[q_proj],[v_proj]"]) == [
        [(["q_proj"],)], [(["v_proj"],)]
    ]  # fmt: skip
    # A start that moves the base has a base of its own, and blocks of 8 bits their own borders.
    assert groups(run_file, ["--lora.init_lora_weights", "pissa,olora"]) == [
        [("pissa",)], [("olora",)]
    ]  # fmt: skip
    # A start from data chooses modules and ranks by them, or moves the base too.
    for varied in (["--lora.init_lora_weights", "eva,lora_ga"], ["--train.seed", "0,1"]):
        words = varied if "eva,lora_ga" in varied else ["--lora.init_lora_weights", "eva", *varied]
        assert [len(group) for group in groups(run_file, words)] == [1, 1]
    words = ["--lora.r", "1,2", "--train.optimizer", "adamw_8bit"]
    assert groups(run_file, words) == [[(1,)], [(2,)]]


def test_buckets_are_powers_of_two():
    assert [rank_bucket(r) for r in (1, 15, 16, 17, 32, 33, 200)] == [16, 16, 16, 32, 32, 64, 256]


def test_a_sweep_keeps_the_best_and_can_be_repeated(run_file, tmp_path):
    words = ["--lora.r", "2,20", "--train.learning_rate", "1e-3,3e-2"]
    told, steps = [], []
    records = sweep(grid(run_file, words), at_once=3, tell=told.append, listener=steps.append)
    directory = tmp_path / "sweep"
    lines = [json.loads(line) for line in (directory / "sweep.jsonl").read_text().splitlines()]
    assert lines == records == told and [r["together"] for r in records] == [2, 2, 2, 2]
    assert steps[0] == {"step": 1, "steps": 2} and len(steps) == 4
    assert all(r["looks"][-1] == [2, r["loss"]] and r["before"] > r["loss"] for r in records)

    best = min(records, key=lambda record: record["loss"])
    config = load_config(directory / "best" / "config.yaml")
    assert (config.lora.r, config.train.learning_rate) == tuple(best["varied"].values())
    assert read_config(directory / "best" / "adapter").r == best["varied"]["lora.r"]
    assert sorted(p.name for p in directory.iterdir()) == ["best", "sweep.jsonl"]
    again = run(prepare(dataclasses.replace(config, output=str(tmp_path / "again"))))
    assert again.after.loss == pytest.approx(best["loss"], rel=1e-5)


def test_a_job_beside_another_starts_from_its_data(make_config):
    plain = make_config(lora={"target_modules": ["down_proj"]}, train={"start_batches": 1})
    lora = dataclasses.replace(plain.lora, init_lora_weights="eva")
    config = dataclasses.replace(plain, lora=lora)
    beside, alone = prepare_beside(config, prepare(plain)), prepare(config)
    assert beside.lora == alone.lora
    for one, other in zip(*map(jax.tree.leaves, (beside.trainable, alone.trainable)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_starts_that_move_the_base_take_turns(run_file, tmp_path):
    words = ["--lora.init_lora_weights", "pissa,true"]
    records = sweep(grid(run_file, words))
    assert [r["together"] for r in records] == [1, 1]
    assert (tmp_path / "sweep" / "best" / "adapter").is_dir()


def test_what_cannot_be_done_together_is_refused(run_file, message_of):
    members = grid(run_file, ["--lora.r", "1,2", "--train.offload_optimizer", "true"])
    assert "train.offload_optimizer" in message_of(sweep, members)


def test_a_used_directory_and_no_adapters_at_once_are_refused(run_file, message_of, tmp_path):
    members = grid(run_file, ["--lora.r", "1,2"])
    assert "at_once must be at least 1" in message_of(sweep, members, at_once=0)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine").touch()
    assert "holds something already" in message_of(sweep, members)
    assert [p.name for p in (tmp_path / "sweep").iterdir()] == ["mine"]


def test_a_sweep_that_ends_early_says_what_there_is(run_file, tmp_path):
    rows = load_config(run_file).data.train
    members = grid(run_file, ["--data.train", f"{rows},{tmp_path / 'nowhere.jsonl'}"])
    with pytest.raises(InputError, match=r"1 of 2 adapters are in sweep\.jsonl"):
        sweep(members)
    left = yaml.safe_load((tmp_path / "sweep" / "best" / "config.yaml").read_text())
    assert left["data"]["train"] == rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora.r", "1,100"], "rank 100 at model/layers/0"),
        (["--lora.target_modules", "[down_proj],[nowhere]"], "target_modules 'nowhere' matches"),
        (["--data.max_length", "32,100000"], "data.max_length: 100000 exceeds"),
    ],
)
def test_a_wrong_member_is_refused_before_any_is_trained(
    run_file, message_of, tmp_path, words, said
):
    assert said in message_of(sweep, grid(run_file, words))
    assert not (tmp_path / "sweep").exists()
