"""Flax models of transformers 4, which later ones have no more."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["gpt2", "gpt2-tied", "llama", "bert", "vit"])
def test_a_model_with_adapters(run_script, model):
    run_script("transformers-flax", "flax_transformers.py", model)
