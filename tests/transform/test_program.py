"""What an adapter adds to a program: two products for each layer, and no new traces."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lora_jax import (
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    nnx_layouts,
    nnx_params,
)
from lora_jax._tree import map_with_path
from tests import compiled
from tests.transform.nnx_models import Attention, Stack

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(x))), None


class Linen(nn.Module):
    """Layers in a scan: they are in the program once."""

    @nn.compact
    def __call__(self, x):
        options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = nn.scan(nn.remat(Block), **options)(name="layers")(x, None)
        return nn.DenseGeneral((2, 3), name="head")(x)


def products(function, *args):
    """Products of matrices in a compiled program."""
    return len(re.findall(r"= \S+ dot\(", jax.jit(function).lower(*args).compile().as_text()))


def test_two_products_for_each_layer_of_linen():
    model = Linen()
    base = compiled.init(model, jax.random.key(0), X)
    lora = lora_linen(model)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), base, config, layouts=lora.layouts(base, X))
    alone = products(lambda p: model.apply({"params": p}, X), base)
    assert products(lambda p: lora.apply({"params": p}, X), base) == alone
    assert products(lambda p: lora.apply({"params": p}, X), combine(base, adapter)) == alone + 2 * 7


@pytest.mark.parametrize(("kind", "layers"), [(Attention, 6), (Stack, 3)])
def test_two_products_for_each_layer_of_nnx(kind, layers):
    model = kind(nnx.Rngs(0))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    layouts = nnx_layouts(model, X)
    adapter = init_adapter(jax.random.key(1), nnx_params(model), config, layouts=layouts)

    def count(module):
        graphdef, state = nnx.split(module)
        return products(lambda state: nnx.merge(graphdef, state)(X), state)

    assert count(lora_nnx(model)) == count(model)
    assert count(lora_nnx(model, adapter)) == count(model) + 2 * layers


def test_steps_trace_once():
    """Other values of an adapter, its scaling and its dropout are no other program."""
    model = Linen()
    base = compiled.init(model, jax.random.key(0), X)
    lora = lora_linen(model)
    config = LoraConfig(r=2, target_modules="all-linear")
    adapter = init_adapter(jax.random.key(1), base, config, layouts=lora.layouts(base, X))
    traces = []

    @jax.jit
    def step(adapter, base, x):
        traces.append(0)
        loss = lambda a: jnp.mean(lora.apply({"params": combine(base, a)}, x) ** 2)  # noqa: E731
        return jax.tree.map(jnp.subtract, adapter, jax.grad(loss)(adapter))

    for scale in (1.0, 2.0, 3.0):
        adapter = step(adapter, base, scale * X)
        adapter = map_with_path(
            lambda path, x, by=scale: by * x if path.endswith("scaling") else x, adapter
        )
    assert len(traces) == 1
