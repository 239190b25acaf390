"""Bases of every kind: windows, tied heads, four bits, caches in eight."""

import dataclasses

import pytest

from lora_jax import QuantConfig
from lora_jax.models import generate, quantize_params
from lora_jax.serve import Engine
from tests.models.families import MODELS, ours
from tests.serve.answers import Adapters, ask

SIZES = dict(max_rows=2, max_length=96, prefill_chunk=16, adapter_slots=1, max_rank=4)
# Their frequencies depend on how long the text is when a token is read, in parts or at once.
BY_LENGTH = ("llama-dynamic",)


def check(base, folder):
    adapters = Adapters(base, folder)
    directory = adapters.make("a", 1)
    # Within the vocabulary of each.
    requests = [ask(i, length, adapter=name) for i, (length, name) in enumerate(
        [(30, "a"), (41, None), (5, "a")]
    )]  # fmt: skip
    requests = [
        dataclasses.replace(request, prompt=tuple(i % 93 + 3 for i in request.prompt))
        for request in requests
    ]
    with Engine(base, **SIZES) as engine:
        engine.load_adapter("a", directory)
        for ticket in [engine.submit(request) for request in (*requests, requests[0])]:
            adapters.check(ticket)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
def test_families(name, pretrained, tmp_path):
    check(dataclasses.replace(ours(name), tokenizer=pretrained.tokenizer), tmp_path)


def test_a_quantized_base_with_windows_and_a_tied_head(pretrained, tmp_path):
    base = ours("qwen2")
    params = quantize_params(base.params, QuantConfig(block_size=16))
    check(dataclasses.replace(base, params=params, tokenizer=pretrained.tokenizer), tmp_path)


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
