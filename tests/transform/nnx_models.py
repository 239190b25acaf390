"""NNX models of every kind, each with an adapter of all that can have one."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import LoraConfig, init_adapter, nnx_layouts, nnx_params
from lora_jax.lora import find_targets

X = jax.random.normal(jax.random.key(9), (2, 5, 8))
KERNELS = r"(?!.*bias).*"
IDS = jnp.array([[1, 4, 6], [0, 2, 2]])


class Attention(nnx.Module):
    """Query and output of other axes, in a list with a plain layer."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlps = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])

    def __call__(self, x):
        x = self.attn(x)
        for mlp in self.mlps:
            x = x + nnx.gelu(mlp(x))
        return x


class Einsums(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Einsum("btd,cdhk->cbthk", (3, 8, 2, 4), (3, 2, 4), rngs=rngs)
        self.out = nnx.Einsum("bthk,hkd->btd", (2, 4, 8), (8,), rngs=rngs)

    def __call__(self, x):
        q, k, v = self.qkv(x)
        return self.out(q * jnp.tanh(k) + v)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Stack(nnx.Module):
    """Three layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(3))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        forward = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.head(forward(x, self.layers))


class Ensemble(nnx.Module):
    """Three modules that each have a part of the input, or that cut by kinds of variables."""

    def __init__(self, rngs):
        self.members = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), out_axes=0)
        return run(self.members, jnp.stack([x, 2 * x, -x]))


class Raw(nnx.Module, pytree=False):
    """Kernels of the module's own, transposed, of three axes, and read in several ways.

    As modules were before they were pytrees: lists of modules need no `nnx.List`.
    """

    def __init__(self, rngs):
        def normal(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

        self.turned, self.heads, self.out = normal(8, 8), normal(2, 8, 4), normal(2, 4, 8)
        self.more = [nnx.Linear(8, 8, rngs=rngs)]
        self.scales = {"out": nnx.Param(jnp.full(8, 2.0))}

    def __call__(self, x):
        x = self.more[0](x)
        x = jnp.einsum("btd,hdk->bthk", x @ self.turned[...].T, self.heads.get_value())
        return jnp.einsum("bthk,hkd->btd", x, self.out) * self.scales["out"][...]


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3,), kernel_dilation=2, feature_group_count=2, rngs=rngs)
        self.back = nnx.ConvTranspose(8, 4, (2,), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.back(nnx.relu(self.conv(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)


class Shared(nnx.Module):
    """One layer under two names, statistics, and dropout with a stream of its own."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = self.first
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.second(nnx.relu(self.first(x)))))


MODELS = {
    "attention": (Attention, X),
    "einsums": (Einsums, X),
    "stack": (Stack, X),
    "ensemble": (Ensemble, X),
    "raw": (Raw, X),
    "convolutions": (Convolutions, X),
    "tied": (Tied, IDS),
    "recurrent": (Recurrent, X),
    "shared": (Shared, X),
}


@functools.cache
def made(name):
    """A model, inputs, its layouts, and an adapter of everything that can have one."""
    kind, inputs = MODELS[name]
    model = kind(nnx.Rngs(0))
    params = nnx_params(model)
    layouts = nnx_layouts(model, inputs)
    config = LoraConfig(r=2, target_modules=KERNELS, lora_alpha=3, init_lora_weights=False)
    assert find_targets(params, config, layouts=layouts)
    return model, inputs, layouts, init_adapter(jax.random.key(1), params, config, layouts=layouts)


def run(model, inputs):
    """The output, through `jax.jit` and the functional style."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(inputs))(state, inputs)
