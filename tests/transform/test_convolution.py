"""Convolutions compute in factored form what they compute with their weights merged."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import (
    InputError,
    LoraConfig,
    combine,
    extract_adapter,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
    resize_adapter,
    unmerge_adapter,
    with_dropout,
)
from lora_jax.adapters import AdapterBank
from lora_jax.lora import KernelLayout
from tests.transform.adapted import KEY, check, close, inputs, start

CONV = {"targets": ["conv"]}


class One(nn.Module):
    """A layer with a name."""

    make: Callable

    @nn.compact
    def __call__(self, x):
        return self.make(name="conv")(x)


def of(kind, *args, **options):
    return One(functools.partial(kind, *args, **options))


LAYERS = {
    "one axis": (of(nn.Conv, 3, (2,)), (2, 5, 4)),
    "a number": (of(nn.Conv, 3, 2, strides=2), (2, 5, 4)),
    "two axes": (of(nn.Conv, 3, (2, 3), strides=(1, 2)), (2, 5, 6, 4)),
    "three axes": (of(nn.Conv, 3, (2, 1, 2), padding=1), (2, 3, 3, 3, 2)),
    "circular": (of(nn.Conv, 3, (3,), padding="CIRCULAR", kernel_dilation=2), (2, 6, 4)),
    "causal": (of(nn.Conv, 3, (3,), padding="CAUSAL", kernel_dilation=2), (2, 6, 4)),
    "groups": (of(nn.Conv, 6, (3, 2), feature_group_count=2), (2, 4, 4, 4)),
    "each feature": (of(nn.Conv, 8, (3, 3), feature_group_count=4), (2, 5, 5, 4)),
    "one example, no bias": (of(nn.Conv, 3, (2, 2), use_bias=False), (5, 5, 4)),
    "two axes of batch": (of(nn.Conv, 3, (2,)), (2, 3, 5, 4)),
    "spread input": (of(nn.Conv, 3, (2,), input_dilation=2, padding=1), (2, 5, 4)),
    "transposed": (of(nn.ConvTranspose, 3, (2, 3), strides=(2, 1)), (2, 4, 3, 4)),
    "transposed kernel": (
        of(nn.ConvTranspose, 3, (3,), strides=(2,), padding="CIRCULAR", transpose_kernel=True),
        (2, 4, 5),
    ),
    "transposed, three axes": (of(nn.ConvTranspose, 2, (2, 1, 2)), (1, 3, 2, 3, 3)),
}
SOME = ["two axes", "groups", "transposed kernel"]


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients(name):
    model, shape = LAYERS[name]
    check(model, inputs(*shape), **CONV)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"quantized": True}])
@pytest.mark.parametrize("name", SOME)
def test_its_variants(name, options):
    model, shape = LAYERS[name]
    check(model, inputs(*shape), **CONV, **options)


@st.composite
def layers(draw):
    """A convolution of any kind, and an input for it."""
    axes = draw(st.integers(1, 2))
    sizes = st.tuples(*[st.integers(1, 3)] * axes)
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    options = dict(strides=draw(sizes), kernel_dilation=draw(sizes))
    paddings = ["SAME", "VALID", "CIRCULAR", 1, [(1, 0)] * axes]
    if draw(st.booleans()):
        kind, options["transpose_kernel"] = nn.ConvTranspose, draw(st.booleans())
    else:
        kind, options["feature_group_count"] = nn.Conv, draw(st.sampled_from([1, 2]))
        paddings += ["REFLECT", *["CAUSAL"] * (axes == 1)]
    options["padding"] = draw(st.sampled_from(paddings))
    if kind is nn.Conv and not isinstance(options["padding"], str):
        options["input_dilation"] = draw(sizes)  # with padding by name lax refuses it
    return of(kind, 4, draw(sizes), **options), (*batch, *[7] * axes, 4)


@given(layers())
@settings(max_examples=15)
def test_any_convolution(case):
    model, shape = case
    params, adapter, layouts, _ = start(model, inputs(*shape), **CONV)
    merged = merge_adapter(params, adapter, layouts=layouts)
    ours = lora_linen(model).apply({"params": combine(params, adapter)}, inputs(*shape))
    close(ours, model.apply({"params": merged}, inputs(*shape)))


def test_the_factors_are_a_convolution_each():
    """No dense kernel is ever made: the layer convolves with A, and multiplies with B."""
    model, x = of(nn.Conv, 40, (3, 3)), inputs(1, 6, 6, 30)
    params, adapter, *_ = start(model, x, **CONV)

    def grouped(x, b):
        return lora_linen(model).apply({"params": combine(params, b)}, x)

    program = jax.make_jaxpr(grouped)(x, adapter)
    widths = [
        eqn.invars[1].aval.shape
        for eqn in program.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert sorted(widths) == [(3, 3, 30, 2), (3, 3, 30, 40)]
    assert "3,3,30,40" not in str([e for e in program.eqns if e.primitive.name == "dot_general"])


def test_layouts_and_shapes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 2), feature_group_count=2)(x)
            x = nn.ConvTranspose(5, (2, 2), transpose_kernel=True)(x)
            return nn.Dense(3)(x)

    x = inputs(1, 4, 4, 4)
    params = Net().init(KEY, x)["params"]
    layouts = lora_linen(Net()).layouts(params, x)
    assert layouts == {
        "Conv_0/kernel": KernelLayout((0, 1, 2), window=(3, 2), groups=2),
        "ConvTranspose_0/kernel": KernelLayout((0, 1, 3), window=(2, 2)),
        "Dense_0/kernel": KernelLayout((0,)),
    }
    config = LoraConfig(r=2, target_modules=["Conv_0", "ConvTranspose_0"])
    adapter = init_adapter(KEY, params, config, layouts=layouts)
    shapes = {name: (x["lora_A"].shape, x["lora_B"].shape) for name, x in adapter.items()}
    assert shapes == {"Conv_0": ((12, 2), (2, 6)), "ConvTranspose_0": ((24, 2), (2, 5))}
    linear = init_adapter(
        KEY, params, LoraConfig(r=2, target_modules="all-linear"), layouts=layouts
    )
    assert set(linear) == {"Dense_0"}


def test_merged_unmerged_extracted_and_resized():
    model, shape = LAYERS["groups"]
    params, adapter, layouts, _ = start(model, inputs(*shape), **CONV)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["conv"])
    merged = merge_adapter(params, adapter, layouts=layouts)
    close(unmerge_adapter(merged, adapter, layouts=layouts), params)
    found = extract_adapter(params, merged, config, layouts=layouts)
    close(merge_adapter(params, found, layouts=layouts), merged)
    wide, own = resize_adapter(adapter, config, rank=4)
    assert wide["conv"]["lora_A"].shape == (12, 4) and own.r == 4
    close(merge_adapter(params, wide, layouts=layouts), merged)


@pytest.mark.parametrize("name", [*SOME, "two axes of batch"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_for_each_row(name, use_dora):
    model, shape = LAYERS[name]
    x = inputs(3, *shape[1:])
    params, first, layouts, _ = start(model, x, **CONV, use_dora=use_dora)
    second = jax.tree.map(lambda x: 1.5 * x, first)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["conv"], use_dora=use_dora)
    bank = AdapterBank.empty(params, config, slots=2, layouts=layouts)
    bank = bank.swap("first", first).swap("second", second)
    adapted = lora_linen(model)
    out = adapted.apply({"params": combine(params, bank.overlay(["second", None, "first"]))}, x)
    trees = (combine(params, second), params, combine(params, first))
    alone = [adapted.apply({"params": tree}, x) for tree in trees]
    close(out, jnp.stack([y[i] for i, y in enumerate(alone)]))
    if name in SOME:  # one example's first axis is no batch's, whatever its length
        with pytest.raises(InputError, match="conv/kernel: .* first axis has to be the batch's"):
            adapted.apply({"params": combine(params, bank.overlay(["first"] * len(x[0])))}, x[0])


def test_dropout_acts_on_the_adapter_s_path_alone():
    model, x = of(nn.Conv, 8, (2, 2)), inputs(2, 4, 4, 3)
    params, adapter, *_ = start(model, x, **CONV)
    dropped = lora_linen(model).apply(
        {"params": combine(params, with_dropout(KEY, adapter, 0.5))}, x
    )
    plain = model.apply({"params": params}, x)
    key, rate = with_dropout(KEY, adapter, 0.5)["conv"]["lora_dropout_key"], 0.5
    kept = jax.random.bernoulli(key, rate, x.shape)
    whole = lora_linen(model).apply({"params": combine(params, adapter)}, x * kept / rate)
    close(dropped - plain, whole - model.apply({"params": params}, x * kept / rate))


def test_of_many_layers():
    """Convolutions in `nn.scan`, `nn.remat` and `nn.vmap`: one adapter for each layer."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Conv(x.shape[-1], (3,), feature_group_count=2, name="conv")(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            block = nn.remat(Block, prevent_cse=False)
            x, _ = nn.scan(block, length=3, **many)(name="layers")(x, None)
            heads = nn.vmap(nn.Conv, in_axes=None, axis_size=2, **many)
            return heads(3, (2,), name="conv")(x)

    _, adapter, layouts = check(Net(), inputs(2, 5, 4), **CONV, rank_pattern={r"layers.0.conv": 1})
    assert layouts["layers/conv/kernel"] == KernelLayout((0, 1), "layers", window=(3,), groups=2)
    assert adapter["layers"]["conv"]["lora_A"].shape == (3, 6, 2)


def test_in_sixteen_bits():
    model, x = of(nn.Conv, 6, (3, 3), dtype=jnp.bfloat16), inputs(2, 5, 5, 4)
    check(model, x, **CONV, rtol=0.03)
    params, adapter, *_ = start(model, x, **CONV)
    assert lora_linen(model).apply({"params": combine(params, adapter)}, x).dtype == jnp.bfloat16


def test_what_is_refused_by_name():
    x = inputs(2, 5, 5, 4)
    unshared = of(nn.ConvLocal, 3, (2, 2))  # over one axis its places are experts
    with pytest.raises(InputError, match="conv/kernel has 4 axes and .* no plain contraction"):
        start(unshared, x, **CONV)
    x = x[0]
    masked = of(nn.Conv, 3, (2,), mask=np.ones((2, 4, 3)))
    params, adapter, layouts, _ = start(masked, x, **CONV)
    with pytest.raises(InputError, match="conv/kernel: lora_dropout needs a layer"):
        tree = combine(params, with_dropout(KEY, adapter, 0.5))
        lora_linen(masked).apply({"params": tree}, x)
    config = LoraConfig(r=2, target_modules=["conv"])
    bank = AdapterBank.empty(params, config, slots=2, layouts=layouts)
    with pytest.raises(InputError, match="conv/kernel: rows of one batch"):
        lora_linen(masked).apply({"params": combine(params, bank.overlay([None, None]))}, x)
    params["conv"]["kernel"] = quantize(params["conv"]["kernel"], contracting=(0,))
    with pytest.raises(InputError, match="conv/kernel: .* quantized with contracting=\\(0,\\)"):
        lora_linen(masked).apply({"params": combine(params, adapter)}, x)
    params["conv"]["kernel"] = jnp.ones((2, 5, 3))
    with pytest.raises(InputError, match="conv/kernel: .* made for another base"):
        lora_linen(masked).apply({"params": combine(params, adapter)}, x)


def test_a_kernel_for_every_place():
    """Without shared weights the places are what experts are."""
    layouts = check(of(nn.ConvLocal, 3, (2,)), inputs(2, 5, 4), **CONV)[2]
    assert layouts["conv/kernel"] == KernelLayout((0,), experts=True)
