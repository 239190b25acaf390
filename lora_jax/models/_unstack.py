"""Layers out of their stack, for decoding on CPUs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import is_below, leaves_with_path, tree_from_paths
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
    leaves: dict[str, Any] = {}

    for path, leaf in leaves_with_path(params):
        if not is_below(path, stack):
            leaves[path] = leaf
            continue
        for number, own in enumerate(np.asarray(leaf)):
            name = f"{stack}/{number}{path.removeprefix(stack)}"
            leaves[name] = jax.device_put(own, may_alias=True)
    written_out = model.clone(unrolled=True)
    if module is not model:
        written_out = dataclasses.replace(module, module=written_out)
    return written_out, tree_from_paths(leaves)


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
