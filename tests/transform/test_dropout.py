"""Dropout lives in the tree: off without a key, on the adapter's path alone, new in every layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraConfig, combine, init_adapter, lora_linen, with_dropout

KEY = jax.random.key(0)


class Masks(nn.Module):
    """Layers whose adapter's output shows which inputs were kept; the base is zero."""

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dense(16, use_bias=False, name="proj")(x)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.remat], ids=["scan", "remat"])
def test_dropout_differs_by_layer_and_step_without_any_rng(wrap):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                wrap(Masks),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=3,
            )
            return layers(name="layers")(0.0, x)[1]

    x, eye = jnp.ones((4, 16)), jnp.broadcast_to(jnp.eye(16), (3, 16, 16))
    base = {"layers": {"proj": {"kernel": jnp.zeros((3, 16, 16))}}}
    proj = {"lora_A": eye, "lora_B": eye, "lora_scaling": jnp.ones(3)}
    adapter = {"layers": {"proj": proj}}

    @jax.jit
    def masks(key):
        dropped = with_dropout(key, adapter, 0.5)
        return lora_linen(Stack()).apply({"params": combine(base, dropped)}, x)

    first, again, second = masks(KEY), masks(KEY), masks(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert set(np.unique(first)) == {0.0, 2.0}
    for one, other in [(first[0], first[1]), (first[1], first[2]), (first, second)]:
        assert 0.2 < (one != other).mean() < 0.8


def test_dropout_acts_on_the_adapter_s_path_alone():
    model, x = nn.Dense(8, name="up"), jax.random.normal(jax.random.key(7), (2, 4))
    params = model.init(jax.random.key(1), x)["params"]
    adapter = init_adapter(KEY, params, LoraConfig(r=2, target_modules="all-linear"))  # B is zero
    dropped = combine(params, with_dropout(KEY, adapter, 0.5))
    np.testing.assert_array_equal(
        lora_linen(model).apply({"params": dropped}, x), model.apply({"params": params}, x)
    )
