"""NNX models of Tunix."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen3-experts", "gemma", "gemma-fused"])
def test_a_model_with_adapters(run_script, model):
    run_script("tunix", "tunix_models.py", model)
