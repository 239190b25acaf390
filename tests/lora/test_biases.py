"""Biases on B and of the base: what is made, trained, merged, resized and refused."""

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
    lora_linear,
    lora_linen,
    merge_adapter,
    partition,
    trainable_mask,
    unmerge_adapter,
)
from lora_jax._tree import leaves_with_path
from lora_jax.lora import KernelLayout, extract_adapter, resize_adapter, scale_adapter
from tests import compiled

KEY = jax.random.key(0)
STACK = {"layers": KernelLayout(stack="layers")}
X = jax.random.normal(KEY, (3, 5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(6, name="q")(x))
        return nn.Dense(4, name="head", use_bias=False)(x)


def base():
    params = compiled.init(Block(), KEY, X)
    params["q"]["bias"] = jnp.arange(6.0)
    return params


def stacked():
    return {"layers": {"q": {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.ones((3, 6))}}}


def config(**fields):
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q"], "init_lora_weights": False}
    return LoraConfig(**{**options, **fields})


def made(**fields):
    return init_adapter(KEY, base(), config(**fields))


def output(params):
    return compiled.apply(lora_linen(Block()), params, X)


def test_a_bias_on_b_by_hand():
    layer = made(lora_bias=True)["q"]
    assert layer["lora_B_bias"].shape == (6,) and layer["lora_B_bias"].any()
    kernel = base()["q"]["kernel"]
    expected = X @ kernel + 3.0 * (X @ layer["lora_A"] @ layer["lora_B"] + layer["lora_B_bias"])
    factors = (layer["lora_A"], layer["lora_B"], layer["lora_scaling"])
    got = lora_linear(X, kernel, *factors, lora_B_bias=layer["lora_B_bias"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not made(lora_bias=True, init_lora_weights=True)["q"]["lora_B_bias"].any()


def test_the_merge_keeps_the_scaling_of_the_bias_on_b():
    """b + scaling·bias_B, as the layer computes it.

    PEFT's merge into bitsandbytes' layers forgets the scaling (its issue 3741), which only shows
    where alpha is not r.
    """
    params, adapter = base(), made(lora_bias=True)
    merged = merge_adapter(params, adapter)
    bias = params["q"]["bias"] + 3.0 * adapter["q"]["lora_B_bias"]
    np.testing.assert_allclose(merged["q"]["bias"], bias, rtol=1e-6)
    expected = output(combine(params, adapter))
    np.testing.assert_allclose(compiled.apply(Block(), merged, X), expected, atol=1e-5)
    again = unmerge_adapter(merged, adapter)
    np.testing.assert_allclose(again["q"]["bias"], params["q"]["bias"], atol=1e-6)
    narrow = merge_adapter(params, adapter, dtype=jnp.bfloat16)["q"]["bias"]
    np.testing.assert_array_equal(narrow, bias.astype(jnp.bfloat16))


def test_both_biases_of_one_layer_merge_together():
    params, adapter = base(), made(lora_bias=True, bias="lora_only")
    adapter["q"]["bias"] = adapter["q"]["bias"] - 7.0
    merged = merge_adapter(params, adapter)["q"]["bias"]
    expected = params["q"]["bias"] - 7.0 + 3.0 * adapter["q"]["lora_B_bias"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5)


def test_layers_of_a_stack_without_an_adapter_get_no_bias():
    fields = dict(lora_bias=True, layers_to_transform=[0, 2], layers_pattern="layers")
    adapter = init_adapter(KEY, stacked(), config(**fields), layouts=STACK)
    layer = adapter["layers"]["q"]
    assert layer["lora_B_bias"].shape == (3, 6)
    assert [bool(row.any()) for row in layer["lora_B_bias"]] == [True, False, True]
    merged = merge_adapter(stacked(), adapter, layouts=STACK)["layers"]["q"]["bias"]
    assert (merged[1] == 1).all() and (merged[0] != 1).all()


@pytest.mark.parametrize("features", [(2, 3), 6])
def test_a_bias_of_several_axes(features):
    model = nn.DenseGeneral(features, name="q")
    outer = nn.Sequential([model])
    params = outer.init(KEY, X)["params"]
    (name,) = params
    layouts = lora_linen(outer).layouts(params, X)
    fields = config(lora_bias=True, target_modules=[name])
    adapter = init_adapter(KEY, params, fields, layouts=layouts)
    expected = lora_linen(outer).apply({"params": combine(params, adapter)}, X)
    merged = merge_adapter(params, adapter, layouts=layouts)
    np.testing.assert_allclose(outer.apply({"params": merged}, X), expected, atol=1e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_gradients_of_the_biases_by_differences(wide):
    params, settings = base(), config(lora_bias=True, bias="all" if wide else "lora_only")
    adapter = init_adapter(KEY, params, settings)
    trained, frozen = partition(adapter, trainable_mask(adapter, settings))
    weights = jax.random.normal(jax.random.key(9), (3, 4))

    def loss(trained):
        return jnp.sum(weights * output(combine(combine(params, frozen), trained)))

    gradient = dict(leaves_with_path(jax.grad(loss)(trained)))
    biases = [path for path in gradient if path.endswith("bias")]
    assert set(biases) == {"q/bias", "q/lora_B_bias"} | ({"norm/bias"} if wide else set())
    for path in biases:
        module, name = path.split("/")
        step = 1e-2 * jax.random.normal(jax.random.key(2), gradient[path].shape)
        ends = []
        for sign in (1, -1):
            layer = {**trained[module], name: trained[module][name] + sign * step}
            ends.append(loss({**trained, module: layer}))
        np.testing.assert_allclose(ends[0] - ends[1], 2 * gradient[path] @ step, rtol=2e-2)


def test_which_biases_are_trained():
    for bias, expected in (
        ("none", set()),
        ("all", {"q/bias", "norm/bias"}),
        ("lora_only", {"q/bias"}),
    ):
        settings = config(bias=bias, lora_bias=True)
        adapter = init_adapter(KEY, base(), settings)
        factors = {"q/lora_A", "q/lora_B", "q/lora_B_bias"}
        leaves = {path for path, _ in leaves_with_path(adapter)}
        assert leaves == factors | {"q/lora_scaling"} | expected
        for tree in (adapter, combine(base(), adapter)):
            mask = dict(leaves_with_path(trainable_mask(tree, settings)))
            assert {path for path, yes in mask.items() if yes} == factors | expected


def test_a_trained_bias_replaces_the_base_s():
    adapter = made(bias="all")
    adapter["norm"]["bias"] = adapter["norm"]["bias"] + 2
    merged = merge_adapter(base(), adapter)
    assert (merged["norm"]["bias"] == 2).all()
    np.testing.assert_allclose(
        compiled.apply(Block(), merged, X), output(combine(base(), adapter)), atol=1e-5
    )
    with pytest.raises(InputError, match="replaced the base's"):
        unmerge_adapter(merged, adapter)


@pytest.mark.parametrize(
    ("params", "fields", "words"),
    [
        ({"q": {"kernel": jnp.ones((4, 6))}}, {"bias": "all"}, "this base has none; use bias"),
        ({"q": {"kernel": jnp.ones((4, 6))}, "n": {"bias": jnp.ones(3)}}, {"bias": "lora_only"},
         "no adapted layer of this base has one; use bias='none'"),
        ({"q": {"embedding": jnp.ones((4, 6))}}, {"lora_bias": True}, "an embedding or another"),
        (stacked(), {"bias": "lora_only", "layers_to_transform": [1], "layers_pattern": "layers"},
         "would train layers/q/bias of all stacked layers, and layers/0/q is not adapted"),
        ({"q": {"kernel": jnp.ones((4, 6))}}, {"r": 5},
         "rank 5 at q exceeds the smaller side of its 4 to 6; a rank above 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_made(params, fields, words):
    layouts = STACK if "layers" in params else None
    with pytest.raises(InputError) as error:
        init_adapter(KEY, params, config(**fields), layouts=layouts)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_no_bias_to_merge_into():
    params = {"q": {"kernel": jnp.ones((5, 6))}}
    adapter = init_adapter(KEY, params, config(lora_bias=True))
    with pytest.raises(InputError, match="q/bias: lora_bias is merged into a layer's own bias"):
        merge_adapter(params, adapter)


def test_a_layer_that_only_reads_its_weight_cannot_add_a_bias():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (5, 6))

    params = {"q": compiled.init(Own(), KEY, X)}
    adapter = init_adapter(KEY, params, config(lora_bias=True))
    with pytest.raises(InputError, match="kernel: lora_bias needs a layer whose output is known"):
        compiled.apply(lora_linen(Own()), combine(params, adapter)["q"], X)


def test_shapes_that_do_not_fit():
    adapter = made(lora_bias=True)
    adapter["q"]["lora_B_bias"] = jnp.ones(7)
    with pytest.raises(InputError, match=r"lora_B_bias \(7,\) does not fit lora_B \(2, 6\)"):
        output(combine(base(), adapter))
    with pytest.raises(InputError, match="q/lora_B_bias: the base has no parameter beside it"):
        output(combine(base(), {"q": {"lora_B_bias": jnp.ones(6)}}))


def test_scaled_and_resized_with_their_delta():
    params, adapter, settings = base(), made(lora_bias=True), config(lora_bias=True)
    twice = merge_adapter(params, scale_adapter(adapter, 2.0))["q"]["bias"]
    np.testing.assert_allclose(
        twice, params["q"]["bias"] + 6.0 * adapter["q"]["lora_B_bias"], rtol=1e-5
    )
    wider, resized = resize_adapter(adapter, settings, 4)
    assert resized.lora_bias and resized.scaling("q") == 1
    np.testing.assert_allclose(
        output(combine(params, wider)), output(combine(params, adapter)), atol=1e-5
    )


def test_biases_of_a_tuned_checkpoint():
    tuned = jax.tree.map(lambda x: x + 1.0, base())
    found = extract_adapter(base(), tuned, config(bias="all"))
    np.testing.assert_array_equal(found["norm"]["bias"], tuned["norm"]["bias"])
    with pytest.raises(InputError, match="use that"):
        extract_adapter(base(), tuned, config(lora_bias=True))
