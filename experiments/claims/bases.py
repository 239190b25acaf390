"""Pretrained bases, and tasks for them: rows to train on, to choose by, and to report."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import LoraConfig, init_adapter, lora_linen
from lora_jax.data import Examples, Message, Row, Rows, build_examples
from lora_jax.models import Pretrained, bundled_model, load_pretrained

Params = Mapping[str, Any]


def data_path(name: str) -> Path:
    """A file or folder of the data that the claims are tested on."""
    root = os.environ.get("LORA_JAX_TEST_DATA")
    if root is None or not Path(root, name).exists():
        raise SystemExit(
            f"LORA_JAX_TEST_DATA must name the folder that holds {name}; it is {root or 'not set'}"
        )
    return Path(root, name)


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model: `stories`, 260K parameters, or `bundled`, 3.8M."""

    name: str
    pretrained: Pretrained
    params: Params
    """Its weights in float32; another base, a quantized one say, takes their place."""

    @property
    def model(self) -> Any:
        return lora_linen(self.pretrained.module)

    def lora(
        self, rank: int, alpha: float, modules: Any = "all-linear", **fields: Any
    ) -> LoraConfig:
        """A config whose keys and values, which are narrower, have no more than their full rank.

        Their alpha shrinks as their rank does, so that the scaling is that of the other modules.
        """
        shape = self.pretrained.config
        most = shape.num_key_value_heads * shape.head_dim
        narrow = [n for n in ("k_proj", "v_proj") if modules == "all-linear" or n in modules]
        if rank > most and narrow:
            own = alpha * (most / rank) ** (0.5 if fields.get("use_rslora") else 1.0)
            fields |= {"rank_pattern": dict.fromkeys(narrow, most)}
            fields |= {"alpha_pattern": dict.fromkeys(narrow, own)}
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, **fields)

    def adapter(self, config: LoraConfig, seed: int) -> Params:
        """A new adapter over it."""
        key = jax.random.key(seed)
        return init_adapter(key, self.params, config, layouts=self.pretrained.layouts)


def load_base(name: str) -> Base:
    directory = bundled_model() if name == "bundled" else data_path("stories260K-hf")
    pretrained = load_pretrained(directory, param_dtype="float32")
    return Base(name, pretrained, pretrained.params)


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows in three parts, and how long to train on them.

    `valid` chooses learning rates; `test` is what is reported, in parts with a name each.
    """

    name: str
    train: Examples
    valid: Examples
    test: Mapping[str, Examples]
    steps: int
    batch_size: int = 2
    length: int = 128

    @property
    def sizes(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "seq_length": self.length}


def tiny(task: Task) -> Task:
    """A few steps, and a few rows to measure on: what `--quick` runs."""

    def few(examples: Examples) -> Examples:
        return dataclasses.replace(examples, examples=examples.examples[:8])

    test = {name: few(part) for name, part in task.test.items()}
    return dataclasses.replace(task, valid=few(task.valid), test=test, steps=3)


def texts(base: Base, parts: Sequence[str], length: int) -> Examples:
    """Plain texts as pieces of `length` tokens, every token trained on."""
    rows = [Row((), text, i, f"text {i}") for i, text in enumerate(parts)]
    rows = Rows(tuple(rows), "text", "texts", {})
    tokenizer = base.pretrained.tokenizer
    return _open_ended(build_examples(rows, tokenizer, max_length=length), tokenizer.eos_id)


def pairs(base: Base, given: Sequence[tuple[str, str]]) -> Examples:
    """Prompts and answers; answers alone are trained on."""
    rows = [
        Row((Message("user", prompt), Message("assistant", answer)), "", i, f"pair {i}")
        for i, (prompt, answer) in enumerate(given)
    ]
    rows = Rows(tuple(rows), "prompt_completion", "pairs", {})
    tokenizer = base.pretrained.tokenizer
    return _open_ended(build_examples(rows, tokenizer, template="plain"), tokenizer.eos_id)


def _open_ended(examples: Examples, end: int | None) -> Examples:
    """Without the end of sequence: the small base has never seen its own, and its head is tied."""
    own = [
        dataclasses.replace(x, input_ids=x.input_ids[:-1], loss_mask=x.loss_mask[:-1])
        if x.input_ids[-1] == end
        else x
        for x in examples
    ]
    return dataclasses.replace(examples, examples=tuple(x for x in own if x.loss_mask.any()))


def shares(items: Sequence[Any], *counts: int) -> list[list[Any]]:
    """The first items, those after them, …, and last all that are left."""
    ends = np.cumsum([0, *counts])
    parts = [list(items[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    return [*parts, list(items[ends[-1] :])]
