"""Adapted modules equal themselves with merged weights: outputs and adapter gradients."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
    with_dropout,
)
from lora_jax.lora import KernelLayout
from tests.transform.adapted import KEY, RANDOM, check, close, inputs, start


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="up")(x)
        return nn.Dense(3, use_bias=False, name="down")(nn.gelu(x))


class Setup(nn.Module):
    def setup(self):
        self.up = nn.Dense(8)
        self.down = nn.Dense(5)

    def __call__(self, x):
        return self.down(inputs=self.up(x))


class Shared(nn.Module):
    """One layer called twice, and given to a child."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(x.shape[-1], name="dense")
        return Child(dense)(dense(x))


class Child(nn.Module):
    dense: Any

    def __call__(self, x):
        return self.dense(nn.tanh(x))


def scanned(block, length=3, **options):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
            return nn.scan(block, **{**axes, **options})(name="layers")(x, None)[0]

    return Stack()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="proj")(nn.tanh(x)), None


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )(4, name="members")(x)


class PerRow(nn.Module):
    @nn.compact
    def __call__(self, x):
        rows = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
        return rows(4, name="dense")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x, x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(4, name="dense")(x)


class Deep(nn.Module):
    """Attention inside remat inside scan."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        return x + Compact(name="mlp")(x).sum(-1, keepdims=True), None


MODULES = {
    "compact": (Compact(), (2, 5, 4)),
    "setup": (Setup(), (2, 4)),
    "one vector": (Compact(), (4,)),
    "shared": (Shared(), (2, 4)),
    "scan": (scanned(Block), (2, 4)),
    "remat in scan": (scanned(nn.remat(Block, prevent_cse=False)), (2, 4)),
    "remat": (nn.remat(Compact)(), (2, 4)),
    "ensemble": (Ensemble(), (2, 4)),
    "rows": (PerRow(), (2, 4)),
    "attention": (Attention(), (2, 5, 4)),
    "nn.jit": (Jitted(), (2, 4)),
    "nested": (scanned(nn.remat(Deep, prevent_cse=False)), (2, 5, 4)),
    "general": (
        nn.Sequential([nn.DenseGeneral((2, 3)), nn.DenseGeneral(5, axis=(-2, -1))]),
        (2, 4),
    ),
    "unsorted axes": (nn.Sequential([nn.DenseGeneral((3, 2), axis=(-1, 1))]), (2, 4, 3, 5)),
    "inner axis": (nn.Sequential([nn.DenseGeneral(2, axis=1)]), (2, 4, 3)),
    "einsum": (nn.Sequential([nn.Einsum((4, 2, 3), "btd,dnh->btnh")]), (2, 5, 4)),
    "ellipsis": (nn.Sequential([nn.Einsum((4, 2, 3), "...d,dnh->...nh")]), (2, 5, 4)),
    "turned": (nn.Sequential([nn.Einsum((4, 2, 3), "btd,dnh->nbht")]), (2, 5, 4)),
    "two contracted": (nn.Sequential([nn.Einsum((4, 3, 2), "bthd,hdm->btm")]), (2, 5, 4, 3)),
    "inner contraction": (nn.Sequential([nn.Einsum((2, 4, 3), "btd,ndh->btnh")]), (2, 5, 4)),
    "last contracted": (nn.Sequential([nn.Einsum((3, 4), "bd,fd->bf", use_bias=False)]), (2, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients(name):
    model, shape = MODULES[name]
    check(model, inputs(*shape))


@pytest.mark.parametrize(
    "name",
    ["setup", "shared", "remat in scan", "ensemble", "nn.jit", "nested", "general", "turned"],
)
def test_outputs_and_gradients_over_four_bits(name):
    model, shape = MODULES[name]
    check(model, inputs(*shape), quantized=True)


def test_a_quantized_kernel_contracted_elsewhere_is_read_dense():
    model, x = nn.Sequential([nn.Einsum((2, 64, 3), "btd,ndh->btnh")]), inputs(2, 5, 64)
    layouts = {"layers_0/kernel": KernelLayout((1,))}
    check(model, x, quantized=True, given=layouts)


def test_bfloat16_compute_over_float32_weights():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, dtype=jnp.bfloat16, name="dense")(x).astype(jnp.float32)

    check(Half(), inputs(3, 4), rtol=0.03)


def test_embedding_looked_up_and_attended():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 4, name="embed")
            return embed.attend(nn.Dense(4, name="dense")(embed(ids)))

    _, adapter, _ = check(Tied(), jnp.array([[1, 2, 10], [0, 0, 3]]), targets=["embed", "dense"])
    assert set(adapter["embed"]) == {
        "embedding_lora_A",
        "embedding_lora_B",
        "embedding_lora_scaling",
    }


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (2, x.shape[-1], 3))
        return jnp.einsum("btd,ndh->btnh", x, w)


class Subclass(nn.Dense):
    """Not quite a Dense, so its formula may not be assumed."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def own_product(x, w, dimensions, precision=None, preferred_element_type=None):
    return 3 * jax.lax.dot_general(x, w, dimensions)


class OwnProduct(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dot_general=own_product, name="dense")(x)


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Subclass(3, name="dense")(x)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = jnp.arange(2 * 4 * 3).reshape(2, 4, 3) % 3 != 1
        return nn.Conv(3, (2,), mask=mask, name="conv")(x)


class Unshared(nn.Module):
    """A matrix for each place."""

    @nn.compact
    def __call__(self, x):
        return nn.ConvLocal(3, (2,), name="conv")(x)


FALLBACKS = {
    "raw": (Raw(), ["w"], {"w": KernelLayout((1,))}),
    "subclass": (Wrapped(), ["dense"], None),
    "own product": (OwnProduct(), ["dense"], None),
    "masked convolution": (Masked(), ["conv"], None),
    "unshared convolution": (Unshared(), ["conv"], None),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_unknown_modules_read_the_adapted_weight(name):
    model, targets, layouts = FALLBACKS[name]
    x = inputs(2, 5, 4)
    params, adapter, _ = check(model, x, targets=targets, layouts=layouts, given=layouts)
    with pytest.raises(InputError, match=f"{targets[0]}.*lora_dropout needs a layer"):
        dropped = combine(params, with_dropout(KEY, adapter, 0.1))
        lora_linen(model, layouts=layouts).apply({"params": dropped}, x)


def test_partitioned_parameters():
    class Sharded(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
            out = nn.Dense(x.shape[-1], kernel_init=init, name="dense")(x)
            return nn.Dense(x.shape[-1], name="plain")(out), None

    names = {nn.meta.PARTITION_NAME: "layers"}
    model = scanned(Sharded, metadata_params=names)
    params, _, _ = check(model, inputs(2, 4))
    assert params["layers"]["dense"]["kernel"].names == ("layers", "in", "out")


def test_without_an_adapter_nothing_changes():
    model, x = Compact(), inputs(2, 4)
    variables = model.init(KEY, x)
    np.testing.assert_array_equal(lora_linen(model).apply(variables, x), model.apply(variables, x))


def test_batch_statistics_pass_through():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4, name="dense")(x))
            return nn.Dropout(0.5, deterministic=False)(x)

    model, x = Normed(), inputs(8, 3)
    rngs = {"params": KEY, "dropout": KEY}
    variables = model.init(rngs, x)
    layouts = lora_linen(model).layouts(variables["params"], x, rngs={"dropout": KEY})
    assert layouts == {"dense/kernel": KernelLayout((0,))}
    config = LoraConfig(target_modules=["dense"], **RANDOM)
    adapter = init_adapter(KEY, variables["params"], config)
    both = {**variables, "params": combine(variables["params"], adapter)}
    out, updates = lora_linen(model).apply(both, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    merged = {**variables, "params": merge_adapter(variables["params"], adapter)}
    expected, stats = model.apply(merged, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    close((out, updates), (expected, stats), 1e-4)


def test_another_method():
    class Two(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)

        def __call__(self, x):
            return self.dense(x)

        def twice(self, x):
            return 2 * self.dense(x)

    x = inputs(2, 4)
    params, adapter, *_ = start(Two(), x)
    variables = {"params": combine(params, adapter)}
    once, twice = (lora_linen(Two()).apply(variables, x, method=m) for m in (None, "twice"))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_a_changed_scaling_reaches_a_cached_trace():
    """`nn.jit` keeps its trace, so a scaling in a closure would stay what it was."""
    model, x = Jitted(), inputs(2, 4)
    params, adapter, *_ = start(model, x)
    outs = []
    for scaling in (0.0, 1.0, 2.0):
        adapter["dense"]["lora_scaling"] = jnp.float32(scaling)
        outs.append(lora_linen(model).apply({"params": combine(params, adapter)}, x))
    np.testing.assert_array_equal(outs[0], model.apply({"params": params}, x))
    np.testing.assert_allclose(outs[2] - outs[0], 2 * (outs[1] - outs[0]), rtol=1e-4, atol=1e-6)


def test_rank_patterns_in_a_stack():
    options = dict(rank_pattern={r"layers\.1\.proj": 1}, layers_to_transform=[0, 1])
    options["layers_pattern"] = "layers"
    check(scanned(Block), inputs(2, 4), targets=["proj"], **options)


def test_adapter_for_another_base():
    model, x = Compact(), inputs(2, 4)
    params, adapter, *_ = start(model, x)
    adapter["up"]["lora_A"] = jnp.ones((9, 2))
    with pytest.raises(InputError, match="up/kernel: .*made for another base"):
        lora_linen(model).apply({"params": combine(params, adapter)}, x)
    # Of the right size, but turned: only the layer can tell.
    adapter["up"] |= {"lora_A": jnp.ones((8, 2)), "lora_B": jnp.ones((2, 4))}
    with pytest.raises(InputError, match="up/kernel: .*made for another base"):
        lora_linen(model).apply({"params": combine(params, adapter)}, x)


def test_a_model_without_parameters():
    assert lora_linen(nn.Sequential([nn.tanh])).apply({}, jnp.zeros(2)).shape == (2,)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_parameter_that_is_not_read_by_flax(quantized):
    """It is named, and not cast."""

    class Peeks(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(8, name="dense")(x)
            return x @ self.variables["params"]["dense"]["kernel"]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Peeks(name="peeks")(x)

    x = jnp.ones((2, 64))
    base = Model().init(jax.random.key(0), x)["params"]
    config = LoraConfig(r=2, target_modules=["dense"])
    tree = combine(base, init_adapter(jax.random.key(1), base, config))
    if quantized:
        base["peeks"]["dense"]["kernel"] = quantize(base["peeks"]["dense"]["kernel"])
        tree = base
    with pytest.raises(InputError, match=r"peeks \(Peeks\): .* is used as an array"):
        lora_linen(Model()).apply({"params": tree}, x)


@pytest.mark.parametrize(
    "params", [{}, {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}]
)
def test_parameters_of_another_module(params):
    model = nn.Sequential([nn.Dense(4, name="dense")])
    with pytest.raises(InputError, match="are not those of this Sequential"):
        lora_linen(model).apply({"params": params}, jnp.ones((2, 8)))
    with pytest.raises(InputError, match="are not those of this Sequential"):
        lora_linen(model).layouts(params, jnp.ones((2, 8)))
