"""The engine over every family that transformers makes."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from tests.models.families import MODELS, ours  # noqa: E402
from tests.serve.answers import check  # noqa: E402

# Their frequencies depend on how long the text is when a token is read, in parts or at once.
BY_LENGTH = ("llama-dynamic",)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
def test_families(name, pretrained, tmp_path):
    check(dataclasses.replace(ours(name), tokenizer=pretrained.tokenizer), tmp_path)
