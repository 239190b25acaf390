"""Merging: values, inverses, rounding, what may not be merged."""

import flax
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
    init_adapter,
    merge_adapter,
    quantize,
    unmerge_adapter,
)
from lora_jax.lora import KernelLayout
from lora_jax.quant import dequantize

KEY = jax.random.key(0)


def make(shape, *, contracting=(0,), stacked=False, dtype=jnp.float32, seed=0, **fields):
    key = jax.random.key(seed)
    params = {"s": {"w": {"kernel": jax.random.normal(key, shape).astype(dtype)}}}
    layouts = {"s": KernelLayout(contracting, "s" if stacked else None)}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["w"], init_lora_weights=False, **fields)
    return params, init_adapter(key, params, config, layouts=layouts), layouts


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=2, max_size=4),
    cut=st.data(),
    stacked=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_unmerge_undoes_merge(sizes, cut, stacked, dtype):
    axes = cut.draw(st.permutations(range(len(sizes))))
    contracting = tuple(axes[: cut.draw(st.integers(1, len(sizes) - 1))])
    shape = (3, *sizes) if stacked else tuple(sizes)
    params, adapter, layouts = make(shape, contracting=contracting, stacked=stacked, dtype=dtype)
    before = np.array(params["s"]["w"]["kernel"])
    merged = merge_adapter(params, adapter, layouts=layouts)
    again = unmerge_adapter(merged, adapter, layouts=layouts)["s"]["w"]["kernel"]
    np.testing.assert_array_equal(params["s"]["w"]["kernel"], before)
    largest = np.abs(np.float32(merged["s"]["w"]["kernel"])).max()
    step = float(jnp.finfo(dtype).eps)
    assert again.dtype == dtype and again.shape == before.shape
    np.testing.assert_allclose(np.float32(again), np.float32(before), atol=3 * step * largest)


def test_the_sum_by_hand():
    params, adapter, layouts = make((4, 2, 3), contracting=(0, 1))
    leaf = adapter["s"]["w"]
    expected = params["s"]["w"]["kernel"] + 1.5 * (leaf["lora_A"] @ leaf["lora_B"]).reshape(4, 2, 3)
    merged = merge_adapter(params, adapter, layouts=layouts)["s"]["w"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_quantized_base_is_merged_dequantized(dtype):
    kernel = jax.random.normal(KEY, (2, 64, 6)).astype(dtype)
    params = {"s": {"w": {"kernel": quantize(kernel, stacked=1)}}}
    _, adapter, layouts = make((2, 64, 6), stacked=True)
    leaf = adapter["s"]["w"]
    dense = dequantize(params["s"]["w"]["kernel"], jnp.float32)
    expected = dense + 1.5 * leaf["lora_A"] @ leaf["lora_B"]
    merged = merge_adapter(params, adapter, layouts=layouts, dtype=jnp.float32)
    np.testing.assert_allclose(merged["s"]["w"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    own = merge_adapter(params, adapter, layouts=layouts)["s"]["w"]["kernel"]
    np.testing.assert_array_equal(own, merged["s"]["w"]["kernel"].astype(dtype))


def test_a_wider_dtype_is_rounded_once():
    """A delta far below the resolution of bfloat16 survives a merge into float32."""
    params, adapter, _ = make((4, 4), dtype=jnp.bfloat16)
    params["s"]["w"]["kernel"] = jnp.ones((4, 4), jnp.bfloat16)
    adapter["s"]["w"]["lora_A"] *= 1e-3
    merged = merge_adapter(params, adapter, dtype=jnp.float32)["s"]["w"]["kernel"]
    assert merged.dtype == jnp.float32 and (merged != 1).all()


def test_saved_modules_replace_and_cannot_be_taken_out():
    params = {"q": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
    config = LoraConfig(r=1, target_modules=["q"], modules_to_save=["head"])
    adapter = init_adapter(KEY, params, config)
    adapter["head"]["kernel"] = 2 * adapter["head"]["kernel"]
    merged = merge_adapter(params, adapter)
    assert merged["head"]["kernel"].dtype == jnp.bfloat16
    assert (merged["head"]["kernel"] == 2).all() and (params["head"]["kernel"] == 1).all()
    with pytest.raises(InputError, match="head/kernel replaced the base's"):
        unmerge_adapter(merged, adapter)


def test_the_base_s_structure_is_kept():
    params, adapter, _ = make((4, 6))
    frozen = flax.core.freeze({**params, "unused": {}})
    merged = merge_adapter(frozen, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    again = unmerge_adapter(merged, adapter)
    np.testing.assert_allclose(again["s"]["w"]["kernel"], params["s"]["w"]["kernel"], atol=1e-6)


def test_a_base_that_holds_the_adapter_already():
    """As a whole tree does that was trained through `freeze_base`."""
    params, adapter, _ = make((4, 6))
    merged = merge_adapter(params, adapter)
    for again in (adapter, {}):
        both = merge_adapter(combine(params, adapter), again)
        assert jax.tree.structure(both) == jax.tree.structure(merged)
        np.testing.assert_array_equal(both["s"]["w"]["kernel"], merged["s"]["w"]["kernel"])


def test_a_kernel_quantized_along_other_axes():
    _, adapter, _ = make((4, 2, 3), contracting=(0, 1))
    kernel = quantize(jnp.ones((4, 2, 3)), contracting=1)
    with pytest.raises(InputError, match=r"quantized with contracting=\(0,\); quantize it along"):
        merge_adapter({"s": {"w": {"kernel": kernel}}}, adapter)


def test_boxes_are_kept():
    boxed = nn.Partitioned(jnp.ones((4, 6)), names=("x", None))
    _, adapter, _ = make((4, 6))
    merged = merge_adapter({"s": {"w": {"kernel": boxed}}}, adapter)["s"]["w"]["kernel"]
    assert merged.names == ("x", None)
    plain = merge_adapter({"s": {"w": {"kernel": jnp.ones((4, 6))}}}, adapter)
    np.testing.assert_array_equal(merged.value, plain["s"]["w"]["kernel"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: {"s": {"w": {**a["s"]["w"], "lora_A": jnp.ones((5, 2))}}}, "do not fit"),
        (lambda a: {"s": {"w": {**a["s"]["w"], "lora_B": jnp.ones((3, 6))}}}, "do not fit"),
        (lambda a: {"s": {"x": a["s"]["w"]}}, "no parameter beside it"),
        (lambda a: {"s": {"w": {"lora_A": a["s"]["w"]["lora_A"]}}}, "lacks s/w/lora_B"),
        (lambda a: {**a, "other": {"kernel": jnp.ones(1)}}, "other/kernel: the base has no"),
        (lambda a: {"s": {"w": {"kernel": jnp.ones((4, 7))}}}, r"has shape \(4, 7\), the base's"),
    ],
)
def test_an_adapter_for_another_base(change, word):
    params, adapter, _ = make((4, 6))
    with pytest.raises(InputError, match=word) as error:
        merge_adapter(params, change(adapter))
    assert "\n" not in str(error.value)


def test_a_safe_merge_refuses_what_is_not_finite():
    params, adapter, _ = make((4, 6))
    safe = merge_adapter(params, adapter, safe=True)
    np.testing.assert_array_equal(
        safe["s"]["w"]["kernel"], merge_adapter(params, adapter)["s"]["w"]["kernel"]
    )
    adapter["s"]["w"]["lora_B"] = adapter["s"]["w"]["lora_B"].at[0, 2].set(jnp.nan)
    merge_adapter(params, adapter)
    with pytest.raises(InputError, match="4 of 24 merged weights of s/w/kernel are not"):
        merge_adapter(params, adapter, safe=True)


def test_a_safe_merge_says_what_is_wrong():
    """Too large for the type, or wrong before; a weight left alone is not looked at."""
    params, adapter, _ = make((4, 6), dtype=jnp.float16)
    other = {"norm": {"scale": jnp.array([jnp.inf])}}
    assert jnp.isinf(merge_adapter({**params, **other}, adapter, safe=True)["norm"]["scale"])
    big = {"s": {"w": {**adapter["s"]["w"], "lora_A": jnp.full((4, 2), 1e6)}}}
    with pytest.raises(InputError, match="or the sum is too large for float16"):
        merge_adapter(params, big, safe=True)
    params["s"]["w"]["kernel"] = params["s"]["w"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(InputError, match="1 of 24 .* are not finite, nor are the base's own"):
        merge_adapter(params, adapter, safe=True)
