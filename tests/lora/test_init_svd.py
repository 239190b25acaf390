"""Adapters from singular vectors: against PEFT, and by what they promise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    dequantize,
    init_adapter,
    init_loftq,
    init_pissa,
    lora_linen,
    merge_adapter,
    quantize,
)
from lora_jax.lora import KernelLayout
from tests import compiled

LAYOUTS = {
    "layers": KernelLayout(stack="layers"),
    "layers/o": KernelLayout(contracting=(0, 1), stack="layers"),
}
CONFIG = LoraConfig(
    r=8, lora_alpha=24, target_modules=["q", "o"], rank_pattern={"layers.1.q": 4},
    alpha_pattern={"layers.0.q": 5},
)  # fmt: skip


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    q, o = jax.random.normal(keys[0], (2, 64, 48)), jax.random.normal(keys[1], (2, 4, 16, 32))
    norm = jnp.ones((2, 64))
    return {"layers": {"q": {"kernel": q}, "o": {"kernel": o}, "norm": {"scale": norm}}}


def matrices(leaf):
    return np.asarray(leaf, np.float64).reshape(2, 64, -1)


def test_pissa_computes_what_the_base_did():
    base = weights()
    moved, adapter = init_pissa(base, CONFIG, layouts=LAYOUTS)
    again = merge_adapter(moved, adapter, layouts=LAYOUTS)
    for path in ("q", "o"):
        expected = base["layers"][path]["kernel"]
        np.testing.assert_allclose(again["layers"][path]["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(moved["layers"]["norm"]["scale"], base["layers"]["norm"]["scale"])


@pytest.mark.parametrize("name, ranks", [("q", (8, 4)), ("o", (8, 8))])
def test_pissa_takes_the_largest_directions_of_every_layer(name, ranks):
    base = weights()
    moved, adapter = init_pissa(base, CONFIG, layouts=LAYOUTS)
    for layer, rank in enumerate(ranks):
        s = np.linalg.svd(matrices(base["layers"][name]["kernel"])[layer], compute_uv=False)
        left = np.linalg.svd(matrices(moved["layers"][name]["kernel"])[layer], compute_uv=False)
        np.testing.assert_allclose(left[: len(s) - rank], s[rank:], rtol=1e-4)
        leaves = adapter["layers"][name]
        a, b = np.asarray(leaves["lora_A"][layer]), np.asarray(leaves["lora_B"][layer])
        root = np.sqrt(s[:rank] / leaves["lora_scaling"][layer])
        np.testing.assert_allclose(np.linalg.norm(a, axis=0)[:rank], root, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1)[:rank], root, rtol=1e-4)
        assert not a[:, rank:].any() and not b[rank:].any()


@pytest.mark.parametrize("format, iterations", [("nf4", 1), ("int4", 3)])
def test_loftq_leaves_what_no_adapter_of_its_rank_could_win_back(format, iterations):
    """Against the base it returns, scaling·A·B is the best of its rank (Eckart and Young)."""
    base, quant = weights(), QuantConfig(format, double_quant=False)
    kernel = base["layers"]["o"]["kernel"]
    q, adapter = init_loftq(base, CONFIG, quant, iterations=iterations, layouts=LAYOUTS)
    own = q["layers"]["o"]["kernel"]
    merged = merge_adapter(q, adapter, layouts=LAYOUTS)["layers"]["o"]["kernel"]
    off = matrices(np.asarray(dequantize(own)) - np.asarray(kernel))
    best = [np.sum(np.linalg.svd(x, compute_uv=False)[8:] ** 2) for x in off]
    left = np.sum(matrices(np.asarray(merged) - np.asarray(kernel)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(left, best, rtol=1e-3)
    bare = dequantize(quantize(kernel, quant, stacked=1, contracting=2))
    assert np.all(left < np.sum(matrices(bare - kernel) ** 2, axis=(1, 2)))
    assert bool(jnp.all(dequantize(own) == bare)) == (iterations == 1)


def test_a_quantized_pissa_start_loses_less_than_a_bare_base():
    base, quant = weights(), QuantConfig(double_quant=False)
    # Weights with a few large directions, as trained ones have.
    u, v = jax.random.normal(jax.random.key(5), (2, 64, 4)), jnp.ones((2, 4, 48))
    base["layers"]["q"]["kernel"] += u @ v
    moved, adapter = init_pissa(base, CONFIG, quant, layouts=LAYOUTS)
    kernel = base["layers"]["q"]["kernel"]
    merged = merge_adapter(moved, adapter, layouts=LAYOUTS)["layers"]["q"]["kernel"]
    bare = dequantize(quantize(kernel, quant, stacked=1))
    assert jnp.linalg.norm(merged - kernel) < 0.7 * jnp.linalg.norm(bare - kernel)


def test_what_cannot_be_split_is_named():
    base = weights()
    q = {"layers": base["layers"] | {"q": {"kernel": quantize(base["layers"]["q"]["kernel"])}}}
    with pytest.raises(InputError, match="layers/q/kernel: is quantized already"):
        init_loftq(q, CONFIG, QuantConfig(), layouts=LAYOUTS)
    wide = LoraConfig(r=49, target_modules=["q"])
    with pytest.raises(InputError, match=r"layers/q/kernel: rank 49 exceeds .*\(64, 48\)"):
        init_pissa(base, wide, layouts=LAYOUTS)
    with pytest.raises(InputError, match="iterations must be at least 1, got 0"):
        init_loftq(base, CONFIG, QuantConfig(), iterations=0, layouts=LAYOUTS)


class Table(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Embed(64, 32, name="embed_tokens")(ids)


def test_a_table_is_quantized_along_its_rows():
    """Where rows are looked up in four bits, and the adapter's words stay its first axis."""
    table, ids = jax.random.normal(jax.random.key(1), (64, 32)), jnp.arange(1, 60, 9)
    base = {"embed_tokens": {"embedding": table}}
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens"])
    quantized, adapter = init_loftq(base, config, QuantConfig())
    q = quantized["embed_tokens"]["embedding"]
    assert q.contracting == (1,) and adapter["embed_tokens"]["embedding_lora_A"].shape == (64, 4)
    found = compiled.apply(lora_linen(Table()), combine(quantized, adapter), ids)
    merged = merge_adapter(quantized, adapter)["embed_tokens"]["embedding"]
    np.testing.assert_allclose(found, merged[ids], atol=1e-5)
    fresh = init_adapter(jax.random.key(2), quantized, config)
    assert fresh["embed_tokens"]["embedding_lora_A"].shape == (64, 4)
    found = compiled.apply(lora_linen(Table()), combine(quantized, fresh), ids)
    np.testing.assert_allclose(found, dequantize(q)[ids], atol=1e-6)
