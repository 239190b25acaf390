"""A tiny model that every test of this folder scores and generates with."""

from pathlib import Path

import pytest

from lora_jax.evaluate import TextModel
from lora_jax.models import Pretrained, load_pretrained


@pytest.fixture(scope="session")
def pretrained(base_dir: Path) -> Pretrained:
    return load_pretrained(base_dir)


@pytest.fixture(scope="session")
def text_model(pretrained: Pretrained) -> TextModel:
    return TextModel.of(pretrained, chunk=32)
