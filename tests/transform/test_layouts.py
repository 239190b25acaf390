"""What `layouts` finds by tracing: contracted axes, and where layers are stacked."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
)
from lora_jax.lora import KernelLayout
from lora_jax.transform._contraction import Contraction, contraction_of
from tests import compiled

X = jnp.ones((2, 5, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x), None


def stacked(axis=0, length=3):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=length
            )
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(7, name="head")(x)

    return Model()


def test_attention_in_a_stack():
    model = stacked()
    params = compiled.init(model, jax.random.key(0), X)
    expected = {
        f"layers/attn/{name}/kernel": KernelLayout((0, 1) if name == "out" else (0,), "layers")
        for name in ("query", "key", "value", "out")
    } | {"head/kernel": KernelLayout((0,)), "layers": KernelLayout(stack="layers")}
    assert lora_linen(model).layouts(params, X) == expected
    shapes = jax.eval_shape(lambda: params)
    assert lora_linen(model).layouts(shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)) == expected


def test_a_quantized_stack():
    model = stacked()
    params = compiled.init(model, jax.random.key(0), X)
    expected = lora_linen(model).layouts(params, X)
    query = params["layers"]["attn"]["query"]
    query["kernel"] = quantize(query["kernel"], stacked=1)
    assert lora_linen(model).layouts(params, X) == expected
    assert lora_linen(model).layouts(jax.eval_shape(lambda: params), X) == expected


class Mixed(nn.Module):
    """Flags by position, inputs by name, a convolution, norms in a stack."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.LayerNorm(name="norm")(nn.Dense(4, name="up")(inputs=x)), None

        x = nn.Conv(4, (3,), name="conv")(x) if train else x
        options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = nn.scan(Layer, **options)(name="layers")(x, None)
        return x if mask is None else jnp.where(mask[..., None], x, 0)


def test_flags_names_convolutions_and_norms():
    model = Mixed()
    params = model.init(jax.random.key(0), X, True)["params"]
    mask = jax.ShapeDtypeStruct(X.shape[:2], bool)
    layouts = lora_linen(model).layouts(params, X, True, mask=mask)
    assert layouts == {
        "conv/kernel": KernelLayout((0, 1), window=(3,)),
        "layers": KernelLayout(stack="layers"),
        "layers/up/kernel": KernelLayout((0,), "layers"),
    }
    config = LoraConfig(r=2, target_modules=r"layers\..*", init_lora_weights=False)
    adapter = init_adapter(jax.random.key(0), params, config, layouts=layouts)
    assert set(adapter["layers"]) == {"up"}
    out = lora_linen(model).apply({"params": combine(params, adapter)}, X, True)
    merged = merge_adapter(params, adapter, layouts=layouts)
    assert jnp.allclose(out, model.apply({"params": merged}, X, True), atol=1e-5)


def test_rules_of_the_caller_s_come_first():
    own = {"conv": KernelLayout((0, 1))}
    params = Mixed().init(jax.random.key(0), X, True)["params"]
    layouts = lora_linen(Mixed(), layouts=own).layouts(params, X, True)
    assert layouts["conv"] == own["conv"] and "conv/kernel" not in layouts
    # Where a rule says nothing of a stack, the traced one holds.
    own = {"layers/up": KernelLayout((0,))}
    layouts = lora_linen(Mixed(), layouts=own).layouts(params, X, True)
    assert layouts["layers/up"] == KernelLayout((0,), "layers")


def test_a_stack_that_is_the_whole_model():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(x), None

    options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    model = nn.scan(Layer, **options)()
    params = compiled.init(model, jax.random.key(0), X)
    layouts = lora_linen(model).layouts(params, X)
    assert layouts == {"": KernelLayout(stack=""), "up/kernel": KernelLayout((0,), "")}
    config = LoraConfig(r=2, target_modules=["up"], rank_pattern={"1.up": 1})
    adapter = init_adapter(jax.random.key(0), params, config, layouts=layouts)
    assert adapter["up"]["lora_scaling"].tolist() == [4.0, 8.0, 4.0]


def test_another_stacking_axis_is_refused():
    model = stacked(axis=1)
    params = compiled.init(model, jax.random.key(0), X)
    with pytest.raises(InputError, match="along the first axis"):
        lora_linen(model).layouts(params, X)


def test_stacks_in_stacks_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            inner = nn.scan(Block, length=3, **options)
            x, _ = nn.scan(inner, length=2, **options)(name="layers")(x, None)
            return x

    params = compiled.init(Twice(), jax.random.key(0), X)
    with pytest.raises(InputError, match="need one stack"):
        lora_linen(Twice()).layouts(params, X)


@pytest.mark.parametrize(
    ("module", "ndim", "expected"),
    [
        (nn.Dense(3), 2, Contraction((1,), (0,), (0, 1))),
        (nn.DenseGeneral((3, 2), axis=(-1, 1)), 4, Contraction((1, 3), (0, 1), (0, 1, 2, 3))),
        (nn.DenseGeneral(3, axis=(1,), batch_dims=(0,)), 3, None),
        (nn.Einsum((4, 3), "...d,df->...f"), 4, Contraction((3,), (0,), (0, 1, 2, 3))),
        (nn.Einsum((4, 3), "bd,df->fb"), 2, Contraction((1,), (0,), (1, 0))),
        (nn.Einsum((2, 4, 3), "ebd,edf->ebf"), 3, None),  # a batch axis: experts
        (nn.Einsum((4, 3), "bd,df->b"), 2, None),  # the features are summed
        (nn.Einsum((4, 3), "bdt,df->bf"), 3, None),  # an input axis is summed
        (nn.Einsum((4, 4), "bd,dd->bd"), 2, None),
        (nn.Conv(3, (2,)), 3, None),
    ],
)
def test_contractions(module, ndim, expected):
    assert contraction_of(module, ndim, ()) == expected


def test_an_einsum_given_at_the_call():
    assert contraction_of(nn.Einsum((4, 3)), 2, ("bd,df->bf",)) == Contraction((1,), (0,), (0, 1))
