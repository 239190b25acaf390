"""Runs that reports are made of: one that was recorded, and tiny ones that are trained here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax import LoraConfig
from lora_jax.adapters import DeltaSpectrum
from lora_jax.report import Run, read_run
from lora_jax.train import DataSection, ModelSection, RunConfig, TrainSection, train

RECORDED = Path(__file__).parent / "quickstart"
MARKUP = "<script>alert('one')</script> | `two` & *three*"


@pytest.fixture(scope="session")
def recorded() -> Run:
    """The run of `configs/quickstart.yaml`, looked at every ten steps, with deltas as it had."""
    values = 1.6 * 0.8 ** np.arange(16)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    spectra = [DeltaSpectrum(name, 16, values) for name in names]
    return dataclasses.replace(read_run(RECORDED), spectra=spectra)


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tiny(base_dir, tmp_path_factory):
    """Trains a tiny run; `train=dict(...)` and so on change its sections."""
    top = tmp_path_factory.mktemp("runs")
    words = ["one", "two", "three", "four", "five"]
    rows = [{"prompt": f"{words[i % 5]} {i}", "completion": " ".join(words[: 1 + i % 4])}
            for i in range(40)]  # fmt: skip
    rows[0]["prompt"] = rows[4]["prompt"] = MARKUP
    file = write_rows(top / "rows.jsonl", rows)

    def make(
        name: str,
        listener: Any = None,
        lora: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        again = {"resume": (top / name).exists(), "listener": listener}
        plain = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "log_every": 2, "samples": 0}
        config = RunConfig(
            model=ModelSection(path=str(base_dir), remat="everything"),
            data=DataSection(
                **{"train": file, "max_length": 64, "eval_share": 0.2, **(data or {})}
            ),
            lora=LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **(lora or {})}),
            train=TrainSection(**{**plain, "tensorboard": False, **options}),
            output=str(top / name),
        )
        return train(config, **again).directory

    return make


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without the time that their pictures take."""
    monkeypatch.setattr("lora_jax.report._report.save_figure", lambda *given: None)
    monkeypatch.setattr("lora_jax.report._html.svg", lambda picture: "<svg></svg>")
