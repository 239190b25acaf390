"""Adapters out of two checkpoints: what fine-tuning changed, in low rank."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from .._config import LoraConfig
from .._errors import InputError
from .._tree import combine, leaves_with_path, map_with_path, tree_from_paths
from .._typing import Array, Params
from ..quant import QuantizedTensor, dequantize
from ._init import init_adapter
from ._init_svd import low_rank
from ._layout import Layouts
from ._targets import adapter_names, find_targets, leaf_shape
from ._tied import untied_table


def extract_adapter(
    base_params: Params,
    tuned_params: Params,
    config: LoraConfig,
    *,
    layouts: Layouts | None = None,
) -> dict[str, Any]:
    """The adapter that comes nearest to what fine-tuning did to a base.

        scaling·A·B = the rank-r SVD of W_tuned - W0

    Args:
        base_params: Before; against quantized weights, the adapter makes good their error too.
        tuned_params: After; every parameter of the base is there, in its shape.
        config: Ranks, targets and scaling. What changed elsewhere is lost, unless
            `modules_to_save` or `bias` names it.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        An adapter as from `init_adapter`.

    Raises:
        InputError: if the two have not the same parameters, a rank exceeds a target's
            smaller side, or the config asks for `lora_bias`.

    Example:
        >>> base = {"q": {"kernel": jnp.zeros((4, 6))}}
        >>> tuned = {"q": {"kernel": jnp.ones((4, 6))}}
        >>> config = LoraConfig(r=1, lora_alpha=3, target_modules=["q"])
        >>> found = extract_adapter(base, tuned, config)["q"]
        >>> bool(jnp.allclose(3 * found["lora_A"] @ found["lora_B"], 1.0))
        True

    Source: Eckart and Young 1936.
    """
    if config.lora_bias:
        raise InputError(
            "extract_adapter: lora_bias adds nothing to what bias='lora_only' takes over whole; use"
            " that"
        )
    after = dict(leaves_with_path(tuned_params))
    before = dict(leaves_with_path(base_params))
    tuned = map_with_path(lambda path, old: _counterpart(path, old, after), base_params)
    factors: dict[str, Any] = {}
    for target in find_targets(base_params, config, layouts=layouts):
        change = _dense(after[target.path]) - _dense(before[target.path])
        a, b = low_rank(change, target, config)
        name_a, name_b, _ = adapter_names(target.path)
        factors |= {name_a: a, name_b: b}
    # Scalings, and whole modules as they are after tuning; the factors in it are replaced.
    fresh = init_adapter(jax.random.key(0), tuned, config, layouts=layouts)
    if untied := untied_table(fresh):
        raise InputError(
            f"extract_adapter: the output heads share {untied.table} and changed with it; set"
            " ensure_weight_tying: true, since without it an adapter leaves the head as it was"
        )
    return combine(fresh, tree_from_paths(factors))


def _counterpart(path: str, old: Any, after: Mapping[str, Any]) -> Any:
    if path not in after:
        raise InputError(
            f"extract_adapter: tuned_params has no {path}; give two checkpoints of one model"
        )
    (shape, _), (found, _) = leaf_shape(old), leaf_shape(after[path])
    if found != shape:
        raise InputError(
            f"extract_adapter: {path} has shape {shape} before and {found} after; give two"
            " checkpoints of one model"
        )
    return after[path]


def _dense(leaf: Any) -> Array:
    if isinstance(leaf, QuantizedTensor):
        return dequantize(leaf, jnp.float32)
    return jnp.asarray(meta.unbox(leaf), jnp.float32)
