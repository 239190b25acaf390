"""One tiny engine for all, and adapters for it."""

from collections.abc import Iterator

import pytest

from lora_jax.models import Pretrained, load_pretrained
from lora_jax.serve import Engine
from tests.serve.answers import Adapters, assert_idle

NAMES = ("a", "b", "c")


@pytest.fixture(scope="session")
def pretrained(base_dir) -> Pretrained:
    return load_pretrained(base_dir)


@pytest.fixture(scope="session")
def adapters(pretrained, tmp_path_factory) -> Adapters:
    made = Adapters(pretrained, tmp_path_factory.mktemp("adapters"))
    for seed, name in enumerate(NAMES):
        made.make(name, seed + 1, rank=2 if name == "b" else 4)
    return made


@pytest.fixture(scope="session")
def shared_engine(pretrained) -> Iterator[Engine]:
    sizes = dict(max_rows=4, max_length=96, prefill_chunk=16, adapter_slots=2, max_waiting=32)
    with Engine(pretrained, max_rank=4, **sizes) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine, adapters) -> Iterator[Engine]:
    """The shared engine with three adapters for its two slots; nothing may be left running."""
    for name in NAMES:
        shared_engine.load_adapter(name, adapters.folder / name)
    yield shared_engine
    assert_idle(shared_engine)
