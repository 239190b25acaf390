"""Fresh adapters: spread, independence, dtypes, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import InputError, LoraConfig, init_adapter, quantize, with_dropout
from lora_jax.lora import KernelLayout
from lora_jax.quant import dequantize

KEY = jax.random.key(0)
STACK = {"layers": KernelLayout(stack="layers")}


def base(layers=3, d_in=50, d_out=40):
    kernel = jnp.ones((layers, d_in, d_out))
    return {"layers": {"q": {"kernel": kernel}, "v": {"kernel": kernel}}}


def test_defaults_are_uniform_and_zero():
    adapter = init_adapter(KEY, base(), LoraConfig(r=16, target_modules=["q"]), layouts=STACK)
    a, b = adapter["layers"]["q"]["lora_A"], adapter["layers"]["q"]["lora_B"]
    bound = 50**-0.5
    assert jnp.abs(a).max() <= bound and jnp.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(np.std(a), bound / np.sqrt(3), rtol=0.05)
    assert not b.any()
    assert not jnp.array_equal(a[0], a[1])


def test_other_initialisations():
    fields = dict(r=16, target_modules=["q"])
    gaussian = init_adapter(
        KEY, base(), LoraConfig(init_lora_weights="gaussian", **fields), layouts=STACK
    )["layers"]["q"]
    np.testing.assert_allclose(np.std(gaussian["lora_A"]), 1 / 16, rtol=0.05)
    assert not gaussian["lora_B"].any()
    off = init_adapter(KEY, base(), LoraConfig(init_lora_weights=False, **fields), layouts=STACK)
    b = off["layers"]["q"]["lora_B"]
    assert 0.24 < jnp.abs(b).max() <= 16**-0.5


def test_an_adapter_does_not_depend_on_other_targets():
    one = init_adapter(KEY, base(), LoraConfig(target_modules=["q"]), layouts=STACK)
    two = init_adapter(KEY, base(), LoraConfig(target_modules=["v", "q"]), layouts=STACK)
    fewer = LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern="layers")
    three = init_adapter(KEY, base(), fewer, layouts=STACK)
    a = one["layers"]["q"]["lora_A"]
    np.testing.assert_array_equal(a, two["layers"]["q"]["lora_A"])
    np.testing.assert_array_equal(a[1], three["layers"]["q"]["lora_A"][1])
    assert not np.array_equal(a, two["layers"]["v"]["lora_A"])


def test_smaller_ranks_are_padded_and_stay_zero():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q"],
        rank_pattern={r"layers\.1\.q": 2},
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        init_lora_weights=False,
    )
    q = init_adapter(KEY, base(), config, layouts=STACK)["layers"]["q"]
    assert q["lora_A"].shape == (3, 50, 4) and q["lora_B"].shape == (3, 4, 40)
    np.testing.assert_array_equal(q["lora_scaling"], [2.0, 4.0, 0.0])

    def loss(ab):
        x = jnp.ones((5, 50))
        delta = jnp.einsum("td,ldr,lro,l->lto", x, *ab, q["lora_scaling"])
        return jnp.sum(delta**2)

    for a, b in ((q["lora_A"], q["lora_B"]), jax.grad(loss)((q["lora_A"], q["lora_B"]))):
        assert not a[1, :, 2:].any() and not b[1, 2:].any()
        assert not a[2].any() and not b[2].any()
        assert a[1, :, :2].any() and b[1, :2].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapter_dtype(dtype):
    config = LoraConfig(target_modules=["q"], modules_to_save=["v"], adapter_dtype=dtype)
    layer = init_adapter(KEY, base(), config, layouts=STACK)["layers"]
    assert layer["q"]["lora_A"].dtype == layer["q"]["lora_B"].dtype == dtype
    assert layer["q"]["lora_scaling"].dtype == jnp.float32
    assert layer["v"]["kernel"].dtype == dtype


def test_a_saved_module_is_dense_and_a_copy():
    kernel = jax.random.normal(KEY, (64, 3))
    params = {"q": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": quantize(kernel)}}
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
    adapter = init_adapter(KEY, params, config)
    np.testing.assert_array_equal(
        adapter["head"]["kernel"], dequantize(params["head"]["kernel"], jnp.float32)
    )


def test_embeddings_start_as_peft_s_do():
    config = LoraConfig(r=4, target_modules=["embed"])
    embed = init_adapter(KEY, {"embed": {"embedding": jnp.ones((30, 200))}}, config)["embed"]
    assert not embed["embedding_lora_A"].any()
    np.testing.assert_allclose(np.std(embed["embedding_lora_B"]), 1.0, rtol=0.1)


def test_dropout_leaves():
    adapter = init_adapter(KEY, base(), LoraConfig(target_modules=["q"]), layouts=STACK)
    q = with_dropout(KEY, adapter, 0.1)["layers"]["q"]
    assert q["lora_dropout_key"].shape == q["lora_dropout_rate"].shape == (3,)
    assert len(np.unique(jax.random.key_data(q["lora_dropout_key"]), axis=0)) == 3
    assert with_dropout(KEY, adapter, 0.0) == adapter
    for rate in (1.0, -0.1):
        with pytest.raises(InputError, match=r"rate must be in \[0, 1\)"):
            with_dropout(KEY, adapter, rate)


def test_shapes_alone_have_no_values_to_copy():
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])

    def params():
        return {"q": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 3))}}

    with pytest.raises(InputError, match="head/kernel: modules_to_save copies .*eval_shape"):
        init_adapter(jax.random.key(0), jax.eval_shape(params), config)
    shapes = jax.eval_shape(lambda p: init_adapter(jax.random.key(0), p, config), params())
    assert shapes["head"]["kernel"].shape == (6, 3)
