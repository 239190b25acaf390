"""Layers out of their stack, for decoding on CPUs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import is_below, leaves_with_path, map_with_path, tree_from_paths
from .._typing import Params
from ..quant import QuantizedTensor
from ._decoder import CausalLM

_MOST_LAYERS = 40
"""Layers whose program is compiled in bearable time when each is written out."""


def unstacked(module: Any, params: Params) -> tuple[Any, Params]:
    """A model and its parameters with an array for each layer, where decoding gains by it.

    On CPUs a scan copies each layer's weights out of their stack for every token, which is a
    third of a token's time.  The arrays here are views of the stack's memory: nothing is copied.
    Elsewhere, and for what is quantized, the two are given back as they are.
    """
    model = getattr(module, "module", module)
    if not isinstance(model, CausalLM) or not _gains(module, model, params):
        return module, params
    stack = model.config.family.stack
    views = map_with_path(lambda p, x: np.asarray(x) if is_below(p, stack) else x, params)
    params = map_with_path(
        lambda p, x: jax.device_put(x, may_alias=True) if is_below(p, stack) else x,
        split_layers(views, stack),
    )
    written_out = model.clone(unrolled=True)
    if module is not model:
        written_out = dataclasses.replace(module, module=written_out)
    return written_out, params


def apart(module: Any, adapters: Params) -> Params:
    """Adapters of stacked layers as a module reads them: taken apart if it is unrolled."""
    model = getattr(module, "module", module)
    unrolled = isinstance(model, CausalLM) and model.unrolled
    return split_layers(adapters, model.config.family.stack) if unrolled else adapters


def split_layers(params: Params, stack: str) -> Params:
    """Parameters whose stack is taken apart: `layers/mlp` becomes `layers/0/mlp`, …

    Example:
        >>> split_layers({"layers": {"mlp": np.array([5, 6])}}, "layers")
        {'layers': {'0': {'mlp': np.int64(5)}, '1': {'mlp': np.int64(6)}}}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in leaves_with_path(params):
        if not is_below(path, stack):
            leaves[path] = leaf
            continue
        for number in range(len(leaf)):
            leaves[f"{stack}/{number}{path.removeprefix(stack)}"] = leaf[number]
    return tree_from_paths(leaves)


def laid_out(module: Any, params: Params) -> tuple[Any, Params]:
    """A model and its parameters as programs read them best that are called again and again."""
    model = getattr(module, "module", module)
    return unstacked(module, widened(params, model.dtype))


def widened(params: Params, dtype: Any) -> Params:
    """Parameters in the activations' type where that is wider: the same numbers, for CPUs.

    A product on a CPU is of one type, so that each call of a program would begin by widening all
    of them.  The program's own copy goes in return.

    Example:
        >>> widened({"kernel": jnp.ones(2, jnp.bfloat16)}, jnp.float32)["kernel"].dtype
        dtype('float32')
    """

    def wide(x: Any) -> Any:
        if isinstance(x, QuantizedTensor) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype) if jnp.promote_types(x.dtype, dtype) == dtype else x

    if jax.default_backend() != "cpu":
        return params
    return jax.tree.map(wide, params, is_leaf=lambda x: isinstance(x, QuantizedTensor))


def _gains(module: Any, model: CausalLM, params: Params) -> bool:
    # Quantized kernels and random keys have no plain memory to look at.
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    return (
        jax.default_backend() == "cpu"
        and model.config.num_hidden_layers <= _MOST_LAYERS
        and getattr(module, "layouts_of_params", None) is None
        and all(isinstance(x, np.ndarray | jax.Array) for x in leaves)
        and not any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in leaves)
        and all(len(x.devices()) == 1 for x in leaves if isinstance(x, jax.Array))
    )
