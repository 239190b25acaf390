"""A tiny run to plan, with a cache of its own, and plans without any compiler."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lora_jax.plan import OWNERS, Plan, parse_target


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_file(base_dir: Path, tmp_path: Path) -> Path:
    """A config whose data is nowhere: a plan does not read it."""
    path = tmp_path / "run.yaml"
    config = {
        "model": {"path": str(base_dir)},
        "quant": {"format": "nf4"},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "data": {"train": "nowhere.jsonl", "max_length": 48},
        "train": {"batch_size": 2, "steps": 6},
        "output": "runs/never",
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A plan as a compiler might have made it; `run=` and any field change it."""
    run = {
        "method": "lora", "batch_size": 4, "accumulate": 1, "max_length": 2048,
        "dtype": "bfloat16", "param_dtype": None, "remat": "everything", "optimizer": "adamw",
        "offload_optimizer": False, "loss_chunk": 1024, "rank": 8, "mesh": {}, "idle": None,
        "quant": {"format": "nf4", "embedding": None, "head": None, "stored": False},
    }  # fmt: skip
    gigabytes = (5.6, 0.1, 0.1, 0.2, 0.1, 10.0, 1.0, 0.0)
    plan = Plan(
        target=parse_target("rtx4090"),
        model={"path": "llama", "layers": 32, "width": 4096, "parameters": 8e9, "trainable": 2e7},
        run=run,
        owners={name: round(x * 1e9) for name, x in zip(OWNERS, gigabytes, strict=True)},
        total=17_100_000_000,
        host=0,
        flops={"bfloat16": 10**14},
        traffic=10**11,
        collectives=[],
        refused=None,
        versions={"jax": "0.12"},
        seconds=30.0,
    )

    def make(run: dict | None = None, **fields) -> Plan:
        return dataclasses.replace(plan, run={**plan.run, **(run or {})}, **fields)

    return make
