"""Bases with windows, tied heads and four bits, and caches of eight."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lora_jax import QuantConfig
from lora_jax.models import CausalLM, generate, quantize_params
from lora_jax.serve import Engine
from tests import compiled
from tests.serve.answers import SIZES, ask, check


@pytest.mark.slow
def test_a_quantized_base_with_windows_and_a_tied_head(pretrained, tmp_path):
    kinds = ("sliding_attention", "full_attention")
    config = dataclasses.replace(
        pretrained.config, sliding_window=8, layer_types=kinds, tie_word_embeddings=True
    )
    assert config.windows == (8, None)
    module = CausalLM(config)
    params = compiled.init(module, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    params = quantize_params(params, QuantConfig(block_size=32))
    base = dataclasses.replace(pretrained, module=module, params=params, config=config)
    check(base, tmp_path)


@pytest.mark.slow
def test_a_cache_of_eight_bits(pretrained):
    request = ask(1, 30)
    with Engine(pretrained, **{**SIZES, "adapter_slots": 0}, cache_dtype="int8") as engine:
        ticket = engine.submit(request)
        assert list(ticket)[-1].ending is not None
    expected = generate(
        pretrained.module, pretrained.params, [request.prompt], max_new_tokens=8, cache_dtype="int8"
    )
    assert list(ticket.completion.tokens) == expected[0]
