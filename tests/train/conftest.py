"""A tiny base on disk, rows to train it on, and one way to write a config."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora_jax import InputError, LoraConfig
from lora_jax.models import CausalLM, ModelConfig, save_pretrained
from lora_jax.train import DataSection, ModelSection, RunConfig, TrainSection

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, in Hugging Face layout."""
    directory = tmp_path_factory.mktemp("base") / "base"
    shapes = CausalLM(CONFIG).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    save_pretrained(directory, shapes, CONFIG, dtype="float32")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), "Say hello.", "### Response:"], trainer)
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def row(i: int) -> dict[str, str]:
    return {"prompt": f"{WORDS[i % 10]} {i}", "completion": " ".join(WORDS[: 1 + i % 4])}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    return path


@pytest.fixture
def make_config(base_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of six steps; `train=dict(...)` and so on change its sections."""

    def make(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        **top: Any,
    ) -> RunConfig:
        plain = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "log_every": 2}
        config = RunConfig(
            model=ModelSection(**{"path": str(base_dir), "remat": "none", **(model or {})}),
            data=DataSection(
                **{"train": str(rows_file), "max_length": 48, "eval_share": 0.2, **(data or {})}
            ),
            lora=LoraConfig(**{"r": 4, "target_modules": "all-linear", **(lora or {})}),
            train=TrainSection(**{**plain, "tensorboard": False, **(train or {})}),
            output=str(tmp_path / "run"),
        )
        return dataclasses.replace(config, **top)

    return make


def message_of(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The message of the `InputError` that a call raises: always one line."""
    with pytest.raises(InputError) as raised:
        function(*args, **options)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def records(directory: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock or the machine."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


@pytest.fixture(name="message_of")
def _message_of():
    return message_of


@pytest.fixture(name="records")
def _records():
    return records
