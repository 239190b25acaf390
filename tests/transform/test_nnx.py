"""NNX modules with adapters: equal to their merged selves, and to Linen's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import (
    InputError,
    LoraConfig,
    choose_rows,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    merge_adapter,
    nnx_adapter,
    nnx_layouts,
    nnx_params,
    quantize,
    stack_adapters,
    unmerge_adapter,
    with_dropout,
    with_nnx_params,
)
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.lora import KernelLayout, find_targets
from lora_jax.transform import LoraConstant

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


class Raw(nnx.Module):
    """Kernels of the module's own, transposed, of three axes, and read in several ways."""

    def __init__(self, rngs):
        def normal(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

        self.turned, self.heads, self.out = normal(8, 8), normal(2, 8, 4), normal(2, 4, 8)

    def __call__(self, x):
        x = jnp.einsum("btd,hdk->bthk", x @ self.turned[...].T, self.heads.get_value())
        return jnp.einsum("bthk,hkd->btd", x, self.out)


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


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_its_merge(name):
    model, inputs, layouts, adapter = made(name)
    before = nnx.graphdef(model), nnx_params(model)
    adapted = lora_nnx(model, adapter, layouts=layouts)
    merged = with_nnx_params(model, merge_adapter(nnx_params(model), adapter, layouts=layouts))
    out = run(adapted, inputs)
    np.testing.assert_allclose(out, run(merged, inputs), rtol=2e-5, atol=2e-5)
    assert not np.allclose(out, run(model, inputs), atol=1e-2)
    # What the user has is as it was.
    assert nnx.graphdef(model) == before[0]
    jax.tree.map(np.testing.assert_array_equal, nnx_params(model), before[1])
    # And what went in comes out.
    jax.tree.map(np.testing.assert_array_equal, nnx_adapter(adapted), adapter)
    jax.tree.map(np.testing.assert_array_equal, nnx_params(adapted), before[1])
    back = unmerge_adapter(nnx_params(merged), adapter, layouts=layouts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, before[1])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_dense_weights(name):
    model, inputs, layouts, adapter = made(name)
    base = nnx_params(model)

    def by_merge(adapter):
        merged = merge_adapter(base, adapter, layouts=layouts)
        return jnp.sum(jnp.sin(with_nnx_params(model, merged)(inputs)))

    @nnx.jit
    def by_filter(adapted, inputs):
        def loss(adapted):
            return jnp.sum(jnp.sin(adapted(inputs)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)

    expected = dict(leaves_with_path(jax.jit(jax.grad(by_merge))(adapter)))
    got = by_filter(lora_nnx(model, adapter, layouts=layouts), inputs)
    found = {"/".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(got)}
    assert found.keys() == {p for p in expected if p.endswith(("lora_A", "lora_B"))}
    for path, gradient in found.items():
        scale = float(jnp.max(jnp.abs(expected[path])))
        np.testing.assert_allclose(gradient, expected[path], atol=2e-5 * scale, err_msg=path)


@pytest.mark.parametrize("name", ["attention", "einsums", "stack", "raw", "tied"])
def test_on_four_bits(name):
    model, inputs, layouts, adapter = made(name)
    stacked = {path: layout.stack is not None for path, layout in layouts.items()}

    def four_bits(path, leaf):
        axes = layouts[path].contracting if path in layouts else None
        if name == "tied":
            axes = (1,)
        return quantize(leaf, stacked=stacked[path], contracting=axes) if axes else leaf

    base = map_with_path(four_bits, nnx_params(model))
    small = with_nnx_params(model, base)
    adapted = lora_nnx(small, adapter, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, nnx_params(adapted), base)
    merged = with_nnx_params(model, merge_adapter(base, adapter, layouts=layouts))
    np.testing.assert_allclose(run(adapted, inputs), run(merged, inputs), rtol=2e-5, atol=2e-5)
    bare = with_nnx_params(model, map_with_path(lambda _, x: _dense(x), base))
    np.testing.assert_allclose(run(small, inputs), run(bare, inputs), rtol=2e-5, atol=2e-5)


def _dense(leaf):
    return leaf.unbox() if hasattr(leaf, "unbox") else leaf


def test_a_whole_loop_of_the_user_s():
    model, x = Attention(nnx.Rngs(0)), X
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["mlps/1"])
    layouts = nnx_layouts(model, x)
    adapter = init_adapter(jax.random.key(1), nnx_params(model), config, layouts=layouts)
    adapted = lora_nnx(model, adapter)
    np.testing.assert_allclose(run(adapted, x), run(model, x), atol=1e-6)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(adapted, optimizer, x):
        traces.append(0)

        def loss(adapted):
            return jnp.mean(jnp.square(adapted(x) - 1))

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
        optimizer.update(adapted, grads)
        return value

    losses = [float(step(adapted, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0] and len(traces) == 1
    base = dict(leaves_with_path(nnx_params(model)))
    for path, leaf in leaves_with_path(nnx_params(adapted)):
        np.testing.assert_array_equal(leaf, base[path])
    tuned = dict(leaves_with_path(nnx_adapter(adapted)))
    assert tuned.keys() == dict(leaves_with_path(adapter)).keys()
    assert not np.array_equal(tuned["mlps/1/kernel"], base["mlps/1/kernel"])
    merged = with_nnx_params(
        model, merge_adapter(nnx_params(model), nnx_adapter(adapted), layouts=layouts)
    )
    np.testing.assert_allclose(run(merged, x), run(adapted, x), rtol=1e-5, atol=1e-5)


def test_made_inside_a_trace_of_plain_jax():
    model, inputs, layouts, adapter = made("stack")
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(adapter, state, inputs):
        adapted = lora_nnx(nnx.merge(graphdef, state), adapter, layouts=layouts)
        return jnp.sum(jnp.sin(adapted(inputs)))

    own = gradient(adapter, state, inputs)
    assert jax.tree.structure(own) == jax.tree.structure(adapter)
    assert not own["layers"]["up"]["lora_scaling"].any() and own["layers"]["up"]["lora_A"].any()


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8, name="embed")(ids)
        x = nn.relu(nn.Dense(12, name="up")(x))
        return nn.DenseGeneral((2, 3), name="out")(x)


class NnxBlocks(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.out = nnx.LinearGeneral(12, (2, 3), rngs=rngs)

    def __call__(self, ids):
        return self.out(nnx.relu(self.up(self.embed(ids))))


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_tree_as_linen_s(dora):
    linen = LinenBlocks()
    base = linen.init(jax.random.key(0), IDS)["params"]
    model = with_nnx_params(NnxBlocks(nnx.Rngs(1)), base)
    config = LoraConfig(
        r=2, target_modules=["embed", "up", "out"], use_dora=dora, init_lora_weights=False
    )
    layouts = lora_linen(linen).layouts(base, IDS)
    assert nnx_layouts(model, IDS) == layouts
    adapter = init_adapter(jax.random.key(1), nnx_params(model), config, layouts=layouts)
    expected = init_adapter(jax.random.key(1), base, config, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected)
    for own in (adapter, with_dropout(jax.random.key(5), adapter, 0.5)):
        out = lora_linen(linen).apply({"params": combine(base, own)}, IDS)
        np.testing.assert_allclose(run(lora_nnx(model, own), IDS), out, rtol=1e-5, atol=1e-5)


def test_an_adapter_for_each_row():
    model, inputs, layouts, first = made("attention")
    config = LoraConfig(r=2, target_modules=KERNELS, lora_alpha=3, init_lora_weights=False)
    second = init_adapter(jax.random.key(7), nnx_params(model), config, layouts=layouts)
    slots = stack_adapters([first, second])
    rows = choose_rows(slots, jnp.array([1, -1]))
    out = run(lora_nnx(model, combine(slots, rows), layouts=layouts), inputs)
    np.testing.assert_allclose(out[1], run(model, inputs)[1], rtol=1e-5, atol=1e-5)
    alone = run(lora_nnx(model, second, layouts=layouts), inputs)
    np.testing.assert_allclose(out[0], alone[0], rtol=1e-5, atol=1e-5)


def test_layouts_of_stacks_and_experts():
    assert made("stack")[2]["layers"] == KernelLayout(stack="layers")
    assert made("stack")[2]["layers/down/kernel"] == KernelLayout((0,), "layers")
    assert made("ensemble")[2]["members/up/kernel"] == KernelLayout((0,), experts=True)
    assert made("attention")[2]["attn/out/kernel"] == KernelLayout((0, 1))
    conv = made("convolutions")[2]["conv/kernel"]
    assert conv == KernelLayout((0, 1), window=(3,), groups=2)


def test_another_adapter_takes_the_first_one_s_place():
    model, inputs, layouts, adapter = made("einsums")
    other = map_with_path(lambda path, x: -x if path.endswith("lora_B") else x, adapter)
    twice = lora_nnx(lora_nnx(model, other), adapter)
    np.testing.assert_array_equal(run(twice, inputs), run(lora_nnx(model, adapter), inputs))


def test_constants_are_neither_base_nor_trained():
    adapted = lora_nnx(made("raw")[0], made("raw")[3], layouts=made("raw")[2])
    kinds = {p[-1]: type(x) for p, x in nnx.to_flat_state(nnx.state(adapted, nnx.Param))}
    assert kinds["turned_lora_scaling"] is LoraConstant
    trained = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
    assert {p[-1].rpartition("_")[2] for p, _ in trained} == {"A", "B"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: lora_nnx(nn.Dense(3)), "there is lora_linen"),
        (lambda m: lora_linen(m), "there is lora_nnx"),
        (lambda m: lora_nnx(m, {"gone": {"lora_A": jnp.ones((8, 2))}}), "another structure"),
        (lambda m: lora_nnx(m, {"up": {"kernels": jnp.ones((8, 2))}}), "another structure"),
        (lambda m: lora_nnx(m, {"up": {"lora_A": jnp.ones((8, 2))}}), "lacks up/lora_B"),
        (
            lambda m: lora_nnx(
                m,
                {
                    "up": {
                        "lora_A": jnp.ones((9, 2)),
                        "lora_B": jnp.ones((2, 12)),
                        "lora_scaling": jnp.ones(()),
                    }
                },
            ),
            "another base",
        ),
        (lambda m: with_nnx_params(m, {"up": {"kernel": jnp.ones((3, 3))}}), "this module's"),
        (lambda m: with_nnx_params(m, {"up": {"weight": jnp.ones((3, 3))}}), "not there"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(InputError, match=words):
        call(Block(nnx.Rngs(0)))


def test_quantized_weights_need_the_transform():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    model.kernel.set_value(quantize(model.kernel[...]))
    with pytest.raises(InputError, match="lora_nnx"):
        model(jnp.ones((1, 64)))
    assert lora_nnx(model)(jnp.ones((1, 64))).shape == (1, 8)
