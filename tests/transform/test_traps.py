"""Models in which an adapter easily goes wrong, each of a few lines."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lora_jax import (
    InputError,
    KernelLayout,
    LoraConfig,
    choose_rows,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    merge_adapter,
    nnx_layouts,
    nnx_params,
    stack_adapters,
    with_dropout,
    with_nnx_params,
)
from tests import compiled
from tests.foreign.checks import Model, check, close

X = jax.random.normal(jax.random.key(9), (2, 5, 8))
IDS = jnp.array([[1, 4, 6, 0], [0, 2, 2, 5]])
normal = nn.initializers.normal(0.5)


class Transposed(nn.Module):
    """Square, and the features it meets come last."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x) @ self.param("kernel", normal, (8, 8)).T


class Fused(nn.Module):
    """Queries, keys and values in one kernel, cut along its outputs."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(x @ self.param("qkv", normal, (24, 8)).T, 3, axis=-1)
        return nn.softmax(q @ k.mT) @ v


class Heads(nn.Module):
    """Kernels of one shape and other equations."""

    @nn.compact
    def __call__(self, x):
        def product(equation, x, name):
            return jnp.einsum(equation, x, self.param(name, normal, (8, 8, 8)))

        q, k = (product(f"btd,{axes}->bthk", x, axes) for axes in ("hdk", "dhk"))
        return product("bthk,hkd->btd", jnp.tanh(q) * k, "out")


class Scanned(nn.Module):
    """Layers in a leading axis, of which each is transposed."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + Transposed(name="inner")(x), None

        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.scan(Layer, **axes)(name="layers")(x, None)[0]


class Tied(nn.Module):
    """The head takes the embedding's table out of its variables."""

    embedding: str = "embed"

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8, name=self.embedding)
        x = jnp.tanh(embed(ids))
        table = embed.variables["params"]["embedding"]
        return nn.Dense(7, use_bias=False, parent=None).apply({"params": {"kernel": table.T}}, x)


class Experts(nn.Module):
    """A stack of matrices, each for a part of the tokens."""

    @nn.compact
    def __call__(self, x):
        x = jnp.stack([x, -x, 2 * x]).reshape(3, -1, 8)
        up = self.param("up", normal, (3, 8, 8))
        down = self.param("down", normal, (3, 8, 8))
        return jnp.einsum("ebf,edf->ebd", nn.relu(jnp.einsum("ebd,edf->ebf", x, up)), down)


class Einsum(nn.Module):
    """Linen's own layer, on axes that no block divides."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((8, 9, 11), "btd,dhk->bthk", name="up")(x)
        return nn.Einsum((9, 11, 8), "bthk,hkd->btd", use_bias=False, name="down")(nn.gelu(x))


LINEN = {
    Transposed: {"kernel": KernelLayout((1,))},
    Fused: {"qkv": KernelLayout((1,))},
    Heads: {
        "hdk": KernelLayout((1,)),
        "dhk": KernelLayout((0,)),
        "out": KernelLayout((0, 1)),
    },
    Scanned: {
        "layers": KernelLayout(stack="layers"),
        "layers/inner/kernel": KernelLayout((1,), "layers"),
    },
    Tied: {"embed/embedding": KernelLayout((0,))},
    Experts: {
        "up": KernelLayout((0,), experts=True),
        "down": KernelLayout((1,), experts=True),
    },
    Einsum: {"up/kernel": KernelLayout((0,)), "down/kernel": KernelLayout((0, 1))},
}


@pytest.mark.parametrize("kind", LINEN)
def test_in_linen(kind):
    model, inputs = kind(), IDS if kind is Tied else X
    params = compiled.init(model, jax.random.key(0), inputs)
    layouts = lora_linen(model).layouts(params, inputs)
    assert layouts == LINEN[kind]
    adapted = lora_linen(model, layouts=layouts)
    check(
        Model(
            params,
            layouts,
            lambda params: model.apply({"params": params}, inputs),
            lambda params, adapter: adapted.apply({"params": combine(params, adapter)}, inputs),
        )
    )


class Decoder(nn.Module):
    """By these names a shared table is known for one."""

    @nn.compact
    def __call__(self, ids):
        return Tied("wte", name="transformer")(ids)


@pytest.mark.parametrize("asked", [False, True])
def test_a_head_shares_an_adapter_when_asked_to(asked):
    params = compiled.init(Decoder(), jax.random.key(0), IDS)
    config = LoraConfig(
        r=2, target_modules=["wte"], init_lora_weights=False, ensure_weight_tying=asked
    )
    adapter = init_adapter(jax.random.key(1), params, config)
    merged = merge_adapter(params, adapter)
    table = merged["transformer"]["wte"]["embedding"]
    head = table.T if asked else merged["lm_head"]["kernel"]
    out = compiled.apply(lora_linen(Decoder()), combine(params, adapter), IDS)
    close(out, jnp.tanh(table[IDS]) @ head)


def test_a_shared_table_with_rows_that_are_trained():
    model = Tied()
    params = compiled.init(model, jax.random.key(0), IDS) | {"q": {"kernel": jnp.ones((8, 8))}}
    rows = {"embed": [2, 4]}
    config = LoraConfig(r=2, target_modules=["q"], trainable_token_indices=rows)
    adapter = init_adapter(jax.random.key(1), params, config)
    adapter["embed"]["embedding_lora_tokens"] += 1
    out = compiled.apply(lora_linen(model), combine(params, adapter), IDS)
    close(out, compiled.apply(model, merge_adapter(params, adapter), IDS))


@pytest.mark.parametrize("how", ["dropout", "rows"])
def test_what_a_head_cannot_do_with_another_module_s_table(how):
    params = compiled.init(Decoder(), jax.random.key(0), IDS)
    config = LoraConfig(r=2, target_modules=["wte"], ensure_weight_tying=True)
    adapter = init_adapter(jax.random.key(1), params, config)
    if how == "dropout":
        adapter = with_dropout(jax.random.key(2), adapter, 0.5)
    else:
        slots = stack_adapters([adapter, adapter])
        adapter = combine(slots, choose_rows(slots, jnp.array([0, 1])))
    with pytest.raises(InputError, match="transformer/wte/embedding.*exclude this module"):
        lora_linen(Decoder()).apply({"params": combine(params, adapter)}, IDS)


class Cached(nn.Module):
    """Attention of one head that remembers what it has read."""

    @nn.compact
    def __call__(self, x):
        qkv = self.param("qkv", normal, (8, 24))
        q, k, v = jnp.split(x @ qkv, 3, axis=-1)
        count = self.variable("cache", "count", jnp.zeros, (), jnp.int32)
        keys = self.variable("cache", "keys", jnp.zeros, (2, 5, 8))
        values = self.variable("cache", "values", jnp.zeros, (2, 5, 8))
        places = (0, count.value, 0)
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, places)
        values.value = jax.lax.dynamic_update_slice(values.value, v, places)
        seen = jnp.arange(5) <= count.value + jnp.arange(x.shape[1])[:, None]
        count.value += x.shape[1]
        return nn.softmax(jnp.where(seen, q @ keys.value.mT, -1e9)) @ values.value


def test_calls_that_change_a_cache():
    model = Cached()
    params = compiled.init(model, jax.random.key(0), X)
    layouts = lora_linen(model).layouts(params, X)
    assert layouts == {"qkv": KernelLayout((0,))}
    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), params, config, layouts=layouts)
    dense = merge_adapter(params, adapter, layouts=layouts)
    expected, _ = model.apply({"params": dense}, X, mutable=["cache"])
    adapted = lora_linen(model, layouts=layouts)

    @jax.jit
    def read(cache, x):
        variables = {"params": combine(params, adapter), **cache}
        return adapted.apply(variables, x, mutable=["cache"])

    first, cache = read({}, X[:, :3])
    second, cache = read(cache, X[:, 3:])
    close(jnp.concatenate([first, second], axis=1), expected)
    assert cache["cache"]["count"] == 5


class Mixed(nnx.Module):
    """Kernels of the module's own, one of them turned."""

    def __init__(self, rngs):
        def weight(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

        self.turned, self.heads = weight(8, 8), weight(4, 8, 4)
        self.out = weight(4, 4, 8)

    def __call__(self, x):
        q = jnp.einsum("btd,hdk->bthk", x @ self.turned[...].T, self.heads[...])
        return x + jnp.einsum("bthk,hkd->btd", jnp.tanh(q), self.out[...])


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Mixed(rngs), Mixed(rngs)])

    def __call__(self, x):
        return functools.reduce(lambda x, layer: layer(x), self.layers, x)


class Picked(nnx.Module):
    """Experts that a loop in Python goes through by their numbers."""

    def __init__(self, rngs):
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 8)))

    def __call__(self, x):
        return sum(jnp.tanh(x @ self.experts[...][i].T) for i in range(3))


class Carried(nnx.Module):
    """Layers that a scan cuts, while it carries what they compute."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Mixed, in_axes=0, out_axes=0)(rngs.split(2))

    def __call__(self, x):
        axes = (nnx.Carry, 0)
        run = nnx.scan(lambda x, layer: layer(x), in_axes=axes, out_axes=nnx.Carry)
        return run(x, self.layers)


OWN = {"turned": KernelLayout((1,)), "heads": KernelLayout((1,)), "out": KernelLayout((0, 1))}
LAYERS = {"layers": KernelLayout(stack="layers")}
NNX = {
    Listed: {f"layers/{i}/{name}": own for i in range(2) for name, own in OWN.items()},
    Carried: LAYERS
    | {f"layers/{n}": dataclasses.replace(own, stack="layers") for n, own in OWN.items()},
    Picked: {"experts": KernelLayout((1,), experts=True)},
}


@pytest.mark.parametrize("kind", NNX)
def test_in_nnx(kind):
    model = kind(nnx.Rngs(0))
    params, layouts = nnx_params(model), nnx_layouts(model, X)
    assert layouts == NNX[kind]

    def adapted(params, adapter):
        return lora_nnx(with_nnx_params(model, params), adapter, layouts=layouts)(X)

    check(Model(params, layouts, lambda params: with_nnx_params(model, params)(X), adapted))
