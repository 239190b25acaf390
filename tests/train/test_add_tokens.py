"""Runs that give a model new tokens, from the config to a merged model that speaks them."""

import json

import numpy as np
import pytest

from lora_jax._merging import merge_directories
from lora_jax._speaker import Speaker
from lora_jax.adapters import adapter_notes
from lora_jax.models import load_pretrained, load_without_weights
from lora_jax.train import prepare, prepare_abstract, run
from lora_jax.train._loop import save_result

TOKENS = ["<tool>", "</tool>"]
MARKS = ["<|im_start|>", "<|im_end|>"]
MANY = [*TOKENS, *MARKS, *(f"<t{i}>" for i in range(60))]


@pytest.fixture
def tool_rows(tmp_path):
    file = tmp_path / "tools.jsonl"
    rows = [{"prompt": f"call {i}", "completion": f"<tool>one {i}</tool>"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
def test_the_rows_of_new_tokens_are_trained(make_config, base_dir, tool_rows, tokens) -> None:
    config = make_config(
        model={"add_tokens": tokens}, data={"train": tool_rows}, lora={"target_modules": ["q_proj"]}
    )
    planned, base = prepare_abstract(config), load_without_weights(base_dir)
    known = base.tokenizer.vocab_size
    ids = [known + n for n in range(len(tokens))]
    assert planned.lora.trainable_token_indices == {"embed_tokens": ids, "lm_head": ids}
    assert planned.pretrained.config.vocab_size == max(320, known + len(tokens))
    assert planned.counts()["trainable"] == 2 * 4 * 128 + 2 * len(tokens) * 64


def test_from_a_config_to_a_merged_model(make_config, base_dir, tool_rows, tmp_path) -> None:
    config = make_config(
        model={"add_tokens": MANY}, data={"train": tool_rows, "template": "chatml"},
        train={"steps": 2}, lora={"target_modules": ["q_proj"]},
    )  # fmt: skip
    job = prepare(config)
    first = job.pretrained.tokenizer.token_id("<tool>")
    assert first in job.train[0].input_ids
    result = run(job)
    adapter = result.directory / "adapter"
    rows = result.trainable["model"]["embed_tokens"]["embedding_lora_tokens"]
    assert np.abs(rows - job.trainable["model"]["embed_tokens"]["embedding_lora_tokens"]).max() > 0
    assert adapter_notes(adapter)["add_tokens"] == MANY
    out = tmp_path / "merged"
    said = merge_directories(str(base_dir), str(adapter), str(out), "float32", None)
    assert "merged in float32" in said
    merged = load_pretrained(out)
    assert merged.config.vocab_size == job.pretrained.config.vocab_size
    found = merged.params["model"]["embed_tokens"]["embedding"][first : first + len(MANY)]
    np.testing.assert_allclose(found, rows)
    assert merged.tokenizer.encode("<tool>") == [first]
    # Whoever generates from the files alone stops at the end of a turn too.
    assert merged.config.eos_token_ids == (1, merged.tokenizer.token_id("<|im_end|>"))
    speaker = Speaker.load(str(base_dir), str(adapter), None)
    assert speaker.pretrained.tokenizer.encode("<tool>") == [first]


def test_tables_trained_whole_need_no_rows(make_config, tool_rows) -> None:
    config = make_config(
        model={"add_tokens": TOKENS}, data={"train": tool_rows},
        lora={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    )  # fmt: skip
    assert prepare_abstract(config).lora.trainable_token_indices is None
    half = make_config(
        model={"add_tokens": TOKENS}, data={"train": tool_rows},
        lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    )  # fmt: skip
    assert set(prepare_abstract(half).lora.trainable_token_indices) == {"embed_tokens"}


def test_rows_that_leave_the_new_ones_out(make_config, tool_rows, message_of) -> None:
    config = make_config(
        model={"add_tokens": TOKENS}, lora={"trainable_token_indices": [3]},
    )  # fmt: skip
    said = message_of(prepare_abstract, config)
    assert said.startswith("lora: trainable_token_indices lacks ids of model.add_tokens [")


def test_going_on_from_an_adapter_brings_its_tokens(make_config, tool_rows, tmp_path) -> None:
    first = make_config(
        model={"add_tokens": MANY}, data={"train": tool_rows}, lora={"target_modules": ["q_proj"]}
    )
    job = prepare(first)
    save_result(job, tmp_path, job.trainable)
    again = make_config(
        data={"train": tool_rows}, train={"adapter": str(tmp_path / "adapter")}, output="unused"
    )
    continued = prepare(again)
    assert continued.pretrained.tokenizer.added == tuple(MANY)
    assert continued.lora.trainable_token_indices == job.lora.trainable_token_indices
