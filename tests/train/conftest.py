"""One way to write a run's config, and two to look at what came of it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_jax import InputError, LoraConfig
from lora_jax.train import DataSection, ModelSection, RunConfig, TrainSection


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
            model=ModelSection(**{"path": str(base_dir), "remat": "everything", **(model or {})}),
            data=DataSection(
                **{"train": str(rows_file), "max_length": 48, "eval_share": 0.2, **(data or {})}
            ),
            lora=LoraConfig(**{"r": 4, "target_modules": "all-linear", **(lora or {})}),
            train=TrainSection(**{**plain, "tensorboard": False, "samples": 0, **(train or {})}),
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
