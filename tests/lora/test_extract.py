"""Adapters out of two checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    extract_adapter,
    init_adapter,
    merge_adapter,
    quantize,
)
from lora_jax.lora import KernelLayout

KEY = jax.random.key(0)
LAYOUTS = {"layers": KernelLayout(contracting=(0, 1), stack="layers")}
CONFIG = LoraConfig(
    r=3, lora_alpha=10, target_modules=["o", "embed"], init_lora_weights=False,
    rank_pattern={"layers.1.o": 2, "embed": 1}, use_rslora=True, modules_to_save=["norm"],
)  # fmt: skip


def base(dtype=jnp.float32):
    return {
        "layers": {"o": {"kernel": jax.random.normal(KEY, (2, 2, 3, 8)).astype(dtype)}},
        "embed": {"embedding": jax.random.normal(KEY, (9, 8)).astype(dtype)},
        "norm": {"scale": jnp.ones(8, dtype)},
    }


def assert_same(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(jnp.abs(y).max()))


def test_what_a_merge_put_in_is_found_again():
    params = base()
    adapter = init_adapter(KEY, params, CONFIG, layouts=LAYOUTS)
    adapter["norm"]["scale"] *= 2
    tuned = merge_adapter(params, adapter, layouts=LAYOUTS)
    found = extract_adapter(params, tuned, CONFIG, layouts=LAYOUTS)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, adapter)
    np.testing.assert_array_equal(found["norm"]["scale"], 2)
    np.testing.assert_array_equal(
        found["layers"]["o"]["lora_scaling"], adapter["layers"]["o"]["lora_scaling"]
    )
    assert_same(merge_adapter(params, found, layouts=LAYOUTS), tuned)


def test_the_nearest_of_its_rank_is_taken():
    """Of a change in every direction too (Eckart and Young)."""
    params, tuned = base(), jax.tree.map(lambda x: x**3, base())
    adapter = extract_adapter(params, tuned, CONFIG, layouts=LAYOUTS)
    found = merge_adapter(params, adapter, layouts=LAYOUTS)
    name, kernel = "o", (2, 6, 8)
    change, left = (
        np.float64(tuned["layers"][name]["kernel"] - x["layers"][name]["kernel"]).reshape(kernel)
        for x in (params, found)
    )
    s = np.linalg.svd(change, compute_uv=False)
    best = [np.linalg.norm(s[i, rank:]) for i, rank in enumerate((3, 2))]
    np.testing.assert_allclose(np.linalg.norm(left, axis=(1, 2)), best, rtol=1e-4)


def test_a_quantized_base_s_error_is_made_good_too():
    kernel = jax.random.normal(KEY, (64, 8))
    quantized = {"q": {"kernel": quantize(kernel, QuantConfig())}}
    tuned = {"q": {"kernel": kernel + 0.1}}
    config = LoraConfig(r=8, target_modules=["q"])
    found = merge_adapter(quantized, extract_adapter(quantized, tuned, config), dtype=jnp.float32)
    assert_same(found, tuned)


@pytest.mark.parametrize(
    ("tuned", "rank", "words"),
    [
        ({}, 1, "tuned_params has no q/kernel"),
        (
            {"q": {"kernel": jnp.ones((4, 7))}},
            1,
            r"q/kernel has shape \(4, 6\) before and \(4, 7\)",
        ),
        ({"q": {"kernel": jnp.ones((4, 6))}}, 5, r"rank 5 exceeds the smaller side of \(4, 6\)"),
    ],
)
def test_what_cannot_be_extracted(tuned, rank, words):
    params = {"q": {"kernel": jnp.zeros((4, 6))}}
    with pytest.raises(InputError, match=words) as error:
        extract_adapter(params, tuned, LoraConfig(r=rank, target_modules=["q"]))
    assert "\n" not in str(error.value)
