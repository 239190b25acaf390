"""Adapters merged into their base, and taken out again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from .._errors import InputError
from .._tree import combine, leaves_with_path, map_with_path, partition
from .._typing import Array, Params
from ._biases import bias_of
from ._box import LoraParam, box_adapters
from ._layout import Layouts
from ._single_layers import whole_parameters
from ._targets import leaf_shape
from ._tied import untied_head, untied_table
from ._tokens import TokenParam


def merge_adapter(
    base_params: Params,
    adapter: Params,
    *,
    layouts: Layouts | None = None,
    dtype: Any = None,
    safe: bool = False,
) -> Params:
    """W0 + scaling·A·B for every adapted parameter; neither argument is changed.

    Under `lora_bias` a layer's own bias becomes b + scaling·bias_B.

    Args:
        base_params: The base; quantized weights are merged into their dequantized values.
        adapter: As from `init_adapter`; parameters it holds in full replace the base's.
        layouts: The layouts the adapter was made with.
        dtype: Of merged weights; the base's own by default.
        safe: Refuse a merge that leaves a weight infinite or not a number. It waits for every
            weight, and does not go with `jit`.

    Returns:
        A tree of the base's structure; weights without an adapter stay as they are.  Where the
        output head shares an embedding that is adapted without it (PEFT's default, without
        `ensure_weight_tying`), the tree gets a head of its own, `lm_head/kernel`: it is then one
        of the same model with `tie_word_embeddings=False`.

    Raises:
        InputError: if the adapter does not fit the base, has a bias on B where the base has none
            to merge it into, or is not `safe` to merge.

    Example:
        >>> base = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
        >>> adapter = {"q_proj": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 6)),
        ...                       "lora_scaling": jnp.float32(0.5)}}
        >>> merge_adapter(base, adapter)["q_proj"]["kernel"][0, 0]
        Array(1., dtype=float32)

    Source: Hu et al. 2021, section 4.1 ("no additional inference latency").
    """
    merged = _merge(base_params, adapter, 1.0, layouts, dtype)
    if safe:
        _check_finite(merged, dict(leaves_with_path(base_params)))
    return untied_head(merged, base_params, dtype) if untied_table(adapter) else merged


def unmerge_adapter(
    merged_params: Params, adapter: Params, *, layouts: Layouts | None = None, dtype: Any = None
) -> Params:
    """W - scaling·A·B: the base again, up to rounding (keep the base itself where you can).

    Args:
        merged_params: As from `merge_adapter`.
        adapter, layouts, dtype: As in `merge_adapter`.

    Raises:
        InputError: if the adapter holds whole modules or rows, whose base is lost in a merge, or
            if the merge parted the head from the embedding.

    Example:
        >>> base = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
        >>> adapter = {"q_proj": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 6)),
        ...                       "lora_scaling": jnp.float32(0.5)}}
        >>> unmerge_adapter(merge_adapter(base, adapter), adapter)["q_proj"]["kernel"][0, 0]
        Array(0., dtype=float32)
    """
    if whole := whole_parameters(adapter):
        paths = ", ".join(whole)
        raise InputError(f"unmerge_adapter: {paths} replaced the base's; keep the base instead")
    if untied_table(adapter):
        raise InputError(
            "unmerge_adapter: merging gave this model an output head apart from its embedding;"
            " keep the base instead"
        )
    return _merge(merged_params, adapter, -1.0, layouts, dtype)


def _merge(
    params: Params, adapter: Params, sign: float, layouts: Layouts | None, dtype: Any
) -> Params:
    boxed = dict(leaves_with_path(box_adapters(combine(params, adapter), layouts)))
    before = dict(leaves_with_path(params))
    for path in boxed.keys() - before.keys():
        raise InputError(
            f"{path}: the base has no such parameter; this adapter was made for another base"
        )

    biased = {bias_of(p): box for p, box in boxed.items() if _has_bias(box)}
    for path in biased.keys() - before.keys():
        raise InputError(
            f"{path}: lora_bias is merged into a layer's own bias, and this base has none; keep"
            " the adapter beside the base (lora_linen), or train it without lora_bias"
        )

    def leaf(path: str, old: Any) -> Any:
        value = boxed[path]
        if path in biased:
            whole = _whole(path, value, old, jnp.float32)
            own = leaf_shape(old)[1] if dtype is None else dtype
            new = biased[path].shifted_bias(whole, sign).astype(own)
        elif isinstance(value, LoraParam):
            new = value.shifted(sign, dtype)
        elif isinstance(value, TokenParam):
            new = value.merged(dtype)
        elif value is old:
            return old
        else:  # one of `modules_to_save`, or a trained bias
            new = _whole(path, value, old, dtype)
        return old.replace_boxed(new) if isinstance(old, meta.AxisMetadata) else new

    # A base that holds an adapter already loses it.
    bare = params if boxed.keys() == before.keys() else partition(params, boxed.__contains__)[0]
    return map_with_path(leaf, bare)


def _has_bias(leaf: Any) -> bool:
    return isinstance(leaf, LoraParam) and leaf.lora_B_bias is not None


def _whole(path: str, value: Any, old: Any, dtype: Any) -> Array:
    (shape, own), (found, _) = leaf_shape(old), leaf_shape(value)
    if found != shape:
        raise InputError(
            f"{path}: the adapter's has shape {found}, the base's {shape}; this adapter was made"
            " for another base"
        )
    return meta.unbox(value).astype(own if dtype is None else dtype)


def _check_finite(merged: Params, before: Mapping[str, Any]) -> None:
    """Refuse weights that are not finite; those the merge left alone are not looked at."""
    for path, leaf in leaves_with_path(merged):
        if leaf is before.get(path):
            continue
        new = meta.unbox(leaf)
        if count := int(jnp.sum(~jnp.isfinite(new))):
            own = bool(jnp.isfinite(meta.unbox(before[path])).all())
            why = (
                f"the base's are; the adapter holds NaN, or the sum is too large for {new.dtype}"
                if own
                else "nor are the base's own"
            )
            raise InputError(
                f"merge_adapter: {count} of {new.size} merged weights of {path} are not finite,"
                f" {why}"
            )
