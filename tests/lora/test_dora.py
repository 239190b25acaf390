"""DoRA over every kind of base: quantized, stacked, of several axes, a table that is looked up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
    trainable_mask,
    unmerge_adapter,
)
from lora_jax.lora import column_norm
from tests import compiled


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def trained(adapter):
    """Magnitudes as training might leave them."""
    return jax.tree.map_with_path(
        lambda path, x: (
            x * jnp.linspace(0.5, 1.5, x.size).reshape(x.shape)
            if path[-1].key.endswith("lora_magnitude")
            else x
        ),
        adapter,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_without_the_dense_sum(dtype):
    w, a, b = normal(64, 32).astype(dtype), normal(64, 4, seed=1), normal(4, 32, seed=2)
    dense = np.linalg.norm(np.asarray(w, np.float64) + 0.7 * np.asarray(a @ b, np.float64), axis=0)
    error = {"float32": 1e-6, "bfloat16": 2e-3}[dtype]
    np.testing.assert_allclose(column_norm(w, a, b, 0.7), dense, rtol=error)


def test_norm_of_a_sum_that_is_nothing():
    """No NaN where the adapter takes the whole weight away."""
    a, b = normal(8, 2), normal(2, 4, seed=1)
    norm = column_norm(-(a @ b), a, b, 1.0)
    assert np.isfinite(norm).all() and (np.asarray(norm) < 1e-2).all()


class Model(nn.Module):
    """A table, a tied head, and kernels of two and three axes."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(16, 32, name="table")
        x = table(ids)
        x = x + nn.DenseGeneral((4, 8), name="query")(x).reshape(x.shape)
        x = x + nn.DenseGeneral(32, axis=(-2, -1), name="out")(x.reshape(*x.shape[:-1], 4, 8))
        return table.attend(nn.Dense(32, name="last")(x))


IDS = jnp.arange(10).reshape(2, 5)


@pytest.mark.parametrize("quantized", [False, True])
def test_every_layer_equals_its_merge(quantized):
    model = Model()
    base = compiled.init(model, jax.random.key(0), IDS)
    layouts = lora_linen(model).layouts(base, IDS)
    if quantized:
        config = QuantConfig(block_size=32)
        for name, axes in (("query", (0,)), ("out", (0, 1)), ("last", (0,))):
            base[name]["kernel"] = quantize(base[name]["kernel"], config, contracting=axes)
        base["table"]["embedding"] = quantize(base["table"]["embedding"], config, contracting=(1,))
    config = LoraConfig(
        r=4, lora_alpha=10, use_dora=True, init_lora_weights=False,
        target_modules=["table", "query", "out", "last"],
    )  # fmt: skip
    adapter = trained(init_adapter(jax.random.key(1), base, config, layouts=layouts))
    ours = compiled.apply(lora_linen(model), combine(base, adapter), IDS)
    merged = merge_adapter(base, adapter, layouts=layouts, dtype=jnp.float32)
    expected = compiled.apply(model, merged, IDS)
    assert (
        np.abs(expected - compiled.apply(model, jax.tree.map(lambda x: x, merged), IDS)).max() == 0
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_fresh_dora_changes_nothing():
    model = Model()
    base = compiled.init(model, jax.random.key(0), IDS)
    layouts = lora_linen(model).layouts(base, IDS)
    config = LoraConfig(r=4, use_dora=True, target_modules=["table", "query", "out", "last"])
    adapter = init_adapter(jax.random.key(1), base, config, layouts=layouts)
    ours = compiled.apply(lora_linen(model), combine(base, adapter), IDS)
    expected = compiled.apply(model, base, IDS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    mask = trainable_mask(adapter)["query"]
    assert mask == {
        "lora_A": True, "lora_B": True, "lora_magnitude": True, "lora_scaling": False,
    }  # fmt: skip


def test_layers_of_a_stack_equal_single_ones():
    """Also where a layer has no adapter: then its magnitude is without effect and gradient."""
    from lora_jax.lora import KernelLayout

    base = {"layers": {"q": {"kernel": normal(3, 16, 8)}}}
    layouts = {"layers": KernelLayout(stack="layers")}
    config = LoraConfig(
        r=4, use_dora=True, init_lora_weights=False, target_modules=["q"],
        layers_to_transform=[0, 2], layers_pattern="layers", rank_pattern={r"layers\.2\.q": 2},
    )  # fmt: skip
    adapter = trained(init_adapter(jax.random.key(1), base, config, layouts=layouts))
    merged = merge_adapter(base, adapter, layouts=layouts)["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(merged[1], base["layers"]["q"]["kernel"][1])
    for i in (0, 2):
        own = jax.tree.map(lambda x: x[i], adapter["layers"])  # noqa: B023
        single = merge_adapter({"q": {"kernel": base["layers"]["q"]["kernel"][i]}}, own)
        np.testing.assert_allclose(merged[i], single["q"]["kernel"], rtol=1e-6, atol=1e-6)

    def loss(adapter):
        merged = merge_adapter(base, adapter, layouts=layouts)["layers"]["q"]["kernel"]
        return jnp.sum(merged**3)

    grads = jax.grad(loss)(adapter)["layers"]["q"]["lora_magnitude"]
    assert not grads[1].any() and grads[0].all() and grads[2].all()


def test_what_cannot_be_is_refused():
    base = {"q": {"kernel": normal(16, 8)}}
    config = LoraConfig(r=2, use_dora=True, target_modules=["q"])
    adapter = init_adapter(jax.random.key(0), base, config)
    merged = merge_adapter(base, adapter)
    with pytest.raises(InputError, match="q/kernel: a merged DoRA cannot be taken out again"):
        unmerge_adapter(merged, adapter)
    wrong = {"q": {**adapter["q"], "lora_magnitude": jnp.ones(7)}}
    with pytest.raises(InputError, match=r"lora_magnitude \(7,\) does not fit lora_B \(2, 8\)"):
        merge_adapter(base, wrong)
    shapes = jax.eval_shape(lambda x: x, base)
    with pytest.raises(InputError, match="use_dora measures the base's values"):
        init_adapter(jax.random.key(0), shapes, config)
    found = jax.eval_shape(lambda base: init_adapter(jax.random.key(0), base, config), shapes)
    assert found["q"]["lora_magnitude"].shape == (8,)
