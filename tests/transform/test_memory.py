"""Scanned and rematerialized layers are dense one at a time (compiled, nothing is run)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax import LoraConfig, combine, init_adapter, lora_linen, quantize
from lora_jax.lora import KernelLayout

WIDTH, TOKENS = 256, 4
DENSE = WIDTH * WIDTH * 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, use_bias=False, name="proj")(nn.tanh(x)), None


class Stack(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return nn.scan(block, **axes)(name="layers")(x, None)[0]


def temporary_bytes(layers):
    """Temporaries of a gradient step over a 4-bit stack."""
    kernel = jax.ShapeDtypeStruct((layers, WIDTH, WIDTH), jnp.float32)
    base = {
        "layers": {"proj": {"kernel": jax.eval_shape(lambda w: quantize(w, stacked=1), kernel)}}
    }
    config = LoraConfig(r=2, target_modules=["proj"])
    layouts = {"layers": KernelLayout(stack="layers")}
    adapter = init_adapter(jax.random.key(0), base, config, layouts=layouts)

    def loss(adapter, base, x):
        out = lora_linen(Stack(layers)).apply({"params": combine(base, adapter)}, x)
        return jnp.sum(out**2)

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_more_layers_cost_their_inputs_not_their_weights():
    few, many = temporary_bytes(4), temporary_bytes(16)
    assert few < 6 * DENSE
    # A carry, and what a layer's adapter needs; far from a dense weight of its own.
    assert (many - few) / 12 < 0.1 * DENSE
