"""Adapters made stronger, weaker or opposite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import InputError, LoraConfig, init_adapter, scale_adapter

BASE = {
    "q": {"kernel": jnp.zeros((4, 6))},
    "embed": {"embedding": jnp.zeros((5, 4))},
    "norm": {"scale": jnp.ones(4)},
}


def make(**fields):
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["q", "embed"], init_lora_weights=False, **fields
    )
    return init_adapter(jax.random.key(0), BASE, config)


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_b_is_scaled(factor, dtype):
    """So that the delta is scaled, and the scaling stays the config's."""
    adapter = make(adapter_dtype=dtype)
    scaled = scale_adapter(adapter, factor)
    for module, name in (("q", "lora_B"), ("embed", "embedding_lora_B")):
        expected = jnp.asarray(factor, dtype) * adapter[module].pop(name)
        np.testing.assert_array_equal(scaled[module].pop(name), expected)
    jax.tree.map(np.testing.assert_array_equal, scaled, adapter)


def test_the_factor_may_be_traced():
    adapter = make(adapter_dtype="bfloat16")
    scaled = jax.jit(scale_adapter)(adapter, jnp.float32(0.3))
    assert scaled["q"]["lora_B"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, scaled, scale_adapter(adapter, 0.3))


def test_a_whole_module_is_not_scaled():
    with pytest.raises(InputError, match="holds norm/scale whole"):
        scale_adapter(make(modules_to_save=["norm"]), 2.0)
