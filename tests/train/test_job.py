"""What is checked and counted before the first step."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lora_jax import QuantConfig
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import load_adapter
from lora_jax.train import prepare


@pytest.fixture
def refused(make_config, message_of):
    return lambda **sections: message_of(prepare, make_config(**sections))


def test_rows_set_aside_are_not_trained_on(make_config, rows_file):
    job = prepare(make_config(data={"eval_share": 0.25, "eval_rows": 6}))
    held_out = {e.row for e in job.eval}
    assert held_out == {3, 7, 11, 15, 19, 23}
    # Rows that are not needed for measuring are trained on.
    assert {e.row for e in job.train} == set(range(40)) - held_out
    assert job.places[4] == f"{rows_file}:5"


def test_rows_of_their_own_to_measure_on(make_config, rows_file):
    job = prepare(make_config(data={"eval": str(rows_file), "eval_rows": 3, "train_rows": 10}))
    assert (len(job.train), len(job.eval)) == (10, 3)


def test_default_targets_are_those_of_peft(make_config):
    job = prepare(make_config(lora={"target_modules": None}))
    assert job.config.lora.target_modules == ["q_proj", "v_proj"]
    assert [t.path.split("/")[-2] for t in job.targets] == ["q_proj", "v_proj"]


def test_counts(make_config):
    dense = prepare(make_config())
    per_layer = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert dense.counts()["trainable"] == 2 * per_layer
    assert dense.counts()["trainable_bytes"] == 4 * 2 * per_layer
    sizes = [x.size for x in jax.tree.leaves(dense.base)]
    assert dense.counts()["frozen"] == sum(sizes) == dense.counts()["frozen_bytes"] / 4
    small = prepare(make_config(quant=QuantConfig())).counts()
    assert small["frozen"] == sum(sizes) and small["frozen_bytes"] < dense.counts()["frozen_bytes"]


def test_counts_modules_saved_whole(make_config):
    job = prepare(
        make_config(lora={"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]})
    )
    assert job.counts()["trainable"] == 2 * 4 * (64 + 64) + 64
    # PEFT compares ends of names, whatever stands before: both norms of both layers end so too.
    job = prepare(make_config(lora={"target_modules": ["q_proj"], "modules_to_save": ["norm"]}))
    assert job.counts()["trainable"] == 2 * 4 * (64 + 64) + 5 * 64


def test_counts_biases_on_b(make_config):
    job = prepare(make_config(lora={"target_modules": ["q_proj"], "lora_bias": True}))
    assert job.counts()["trainable"] == 2 * (4 * (64 + 64) + 64)
    chosen = [path for path, yes in leaves_with_path(job.mask(job.trainable)) if yes]
    stem = "model/layers/self_attn/q_proj/lora_"
    assert chosen == [f"{stem}A", f"{stem}B", f"{stem}B_bias"]


def test_full_training_of_16_bit_files_takes_float32(make_config, base_dir):
    train = {"method": "full"}
    job = prepare(make_config(train=train))
    assert job.base == {} and job.counts()["frozen"] == 0 and not job.targets
    section = {"param_dtype": "bfloat16"}
    types = [
        {x.dtype for x in jax.tree.leaves(prepare(make_config(model=m, train=train)).trainable)}
        for m in ({}, section)
    ]
    assert types == [{jnp.dtype("float32")}, {jnp.dtype("bfloat16")}]


def test_adapter_to_go_on_from_brings_its_config(make_config, data_dir):
    """Its ranks and targets count; the dropout is the run's."""
    directory = data_dir / "peft_made" / "stories260K-hf__regex_target"
    job = prepare(
        make_config(
            model={"path": str(data_dir / "stories260K-hf")},
            lora={"r": 64, "lora_dropout": 0.1},
            train={"adapter": str(directory)},
        )
    )
    raw = json.loads((directory / "adapter_config.json").read_text())
    assert (job.config.lora.r, job.config.lora.lora_dropout) == (raw["r"], 0.1)
    adapter, _ = load_adapter(directory, job.pretrained.params, layouts=job.layouts)
    paths = {path for path, _ in leaves_with_path(adapter)}
    assert paths == {path for path, _ in leaves_with_path(job.trainable)}
    assert sum(bool(r) for t in job.targets for r in t.ranks) > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"data": {"max_length": 200}}, "data.max_length: 200 exceeds the 128 positions"),
        (
            {"data": {"train_rows": 4, "eval_share": 0.1}},
            "leaves none to measure on; give data.eval",
        ),
        ({"data": {"max_length": 3}}, "no token is left to train on"),
        ({"model": {"path": "nowhere"}}, "nowhere"),
        ({"model": {"dtype": "float16"}}, "dtype: JAX has no float16 attention on CPUs"),
        ({"lora": {"target_modules": ["q_prj"]}}, "matches nothing (did you mean 'q_proj'?)"),
        (
            {"lora": {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}},
            "model/embed_tokens/embedding, which PEFT's init_lora_weights='pissa' does not move",
        ),
        ({"train": {"adapter": "nowhere"}}, "nowhere/adapter_config.json: no such file"),
    ],
)
def test_refuses(refused, sections, message):
    assert message in refused(**sections)


def test_rows_are_looked_at_before_the_weights(refused):
    assert "nowhere.jsonl" in refused(data={"train": "nowhere.jsonl"}, model={"path": "no-model"})


def test_row_without_an_answer_is_named(refused, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    assert f"{path}:2" in refused(data={"train": str(path)})
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert f"{path}:2" in refused(data={"train": str(path)})


def test_tokenizer_of_another_model(refused, base_dir, tmp_path):
    copy = shutil.copytree(base_dir, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    first, more = tokenizer["added_tokens"][0], range(300, 325)
    tokenizer["added_tokens"] += [{**first, "id": i, "content": f"<{i}>"} for i in more]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "325 tokens, but the model knows 320 (vocab_size)" in refused(model={"path": str(copy)})
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer; training needs tokenizer.json" in refused(model={"path": str(copy)})


def test_truncated_weights(refused, base_dir, tmp_path):
    copy = Path(shutil.copytree(base_dir, tmp_path / "copy"))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "not a whole safetensors file" in refused(model={"path": str(copy)})


def test_adapter_of_another_base(refused, data_dir):
    adapter = data_dir / "peft_made" / "stories260K-hf__lora_r8_all"
    found = refused(train={"adapter": str(adapter)})
    assert str(adapter) in found and "another base" in found
