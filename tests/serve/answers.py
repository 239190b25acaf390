"""Requests, adapters in directories, and what each request says alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import LoraConfig, combine, init_adapter, lora_linen
from lora_jax._tree import map_with_path
from lora_jax.adapters import save_adapter
from lora_jax.models import Pretrained, generate
from lora_jax.serve import Engine, Request, Ticket

GAP = 1e-4
"""Two best log-probabilities closer than this may change places by rounding."""
SIZES = dict(max_rows=2, max_length=96, prefill_chunk=16, adapter_slots=1, max_rank=4)
"""Of an engine that is made for one test."""
LONGEST, MOST = 64, 32
"""Tokens of a prompt and of an answer at most."""


@dataclasses.dataclass
class Adapters:
    """Adapters with directories of their own, strong enough to change every answer."""

    base: Pretrained
    folder: Path
    trees: dict[str | None, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """The plain base as an adapter that does nothing, which needs no program of its own."""
        self.make("nothing", 0, factor=0.0)
        self.trees[None] = self.trees["nothing"]

    def make(self, name: str, seed: int, rank: int = 4, factor: float = 1.0) -> Path:
        config = LoraConfig(
            r=rank, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
        )
        layouts = self.base.layouts
        tree = init_adapter(jax.random.key(seed), self.base.params, config, layouts=layouts)
        tree = map_with_path(lambda path, x: factor * x if path.endswith("lora_B") else x, tree)
        self.trees[name] = dict(tree)
        save_adapter(
            self.folder / name, self.trees[name], config,
            layouts=layouts,
        )  # fmt: skip
        return self.folder / name

    def alone(self, request: Request) -> list[int]:
        """What `generate` says to a request beside one that never changes.

        The other makes all calls of one shape, so that they share their programs.
        """
        sampling = {
            field.name: getattr(request.sampling, field.name)
            for field in dataclasses.fields(request.sampling)
        }
        if sampling["seed"] is not None:
            sampling["seed"] = [sampling["seed"], 0]
        base, ids = self.base, request.stop_ids
        vocabulary = base.config.vocab_size
        params = combine(base.params, self.trees[request.adapter])
        eos = base.tokenizer.stop_ids if ids is None else ids
        answers = generate(
            lora_linen(base.module), params, [request.prompt, prompt(0, LONGEST, vocabulary)],
            max_new_tokens=[request.max_new_tokens, MOST], eos_ids=list(eos), **sampling,
        )  # fmt: skip
        return answers[0]

    def check(self, ticket: Ticket) -> None:
        """An answer is what it would be alone, up to the first place where two tokens tie."""
        *events, last = ticket
        assert last.ending in ("stop", "length"), last
        expected = self.alone(ticket.request)
        for found, token in zip([*events, last], expected, strict=True):
            assert found.logprobs is not None
            (_, best), (_, second) = found.logprobs.top
            if best - second < GAP:
                return
            assert found.token == token


def assert_idle(engine: Engine) -> None:
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    assert not any(slot.users for slot in engine._slots.slots)
    assert all(row.job is None for row in engine._scheduler.rows)


def prompt(seed: int, length: int, vocabulary: int = 290) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(3, vocabulary, length))


def ask(seed: int, length: int = 10, **options: Any) -> Request:
    """A request with two log-probabilities, which `check` looks at."""
    options = {"max_new_tokens": 8, "logprobs": 2, **options}
    return Request(prompt(seed, length), **options)


def check(base: Pretrained, folder: Path) -> None:
    """A base's answers, with an adapter and without, are those of `generate`."""
    adapters = Adapters(base, folder)
    directory = adapters.make("a", 1)
    few = base.config.vocab_size - 3
    requests = [
        Request(prompt(length, length, few), adapter=name, max_new_tokens=8, logprobs=2)
        for length, name in ((30, "a"), (41, None), (5, "a"))
    ]
    with Engine(base, **SIZES) as engine:
        engine.load_adapter("a", directory)
        for ticket in [engine.submit(request) for request in (*requests, requests[0])]:
            adapters.check(ticket)
