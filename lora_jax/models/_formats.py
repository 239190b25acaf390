"""How each parameter of a decoder is kept: its shape, dense or in a quantized format."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import InputError
from .._names import is_kernel, stack_of
from .._quant_config import QuantConfig
from .._tree import leaves_with_path, map_with_path
from .._typing import Params
from ..quant import QuantizedTensor, quantize
from ._checkpoint import float_dtype
from ._config import ModelConfig
from ._decoder import CausalLM
from ._families import FAMILIES, Family


def abstract_params(
    config: ModelConfig, *, quant: QuantConfig | None = None, param_dtype: str = "float32"
) -> Params:
    """The shapes and dtypes of a model's parameters, with nothing allocated.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> abstract_params(config)["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 32, 64)
    """
    dtype = float_dtype(param_dtype, "param_dtype")

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> Any:
        x = jax.ShapeDtypeStruct(x.shape, dtype)
        return stored_shape(path, x, quant_of(path, quant, config.family), config.family)

    return map_with_path(leaf, _shapes(config))


def quantize_params(params: Params, quant: QuantConfig) -> Params:
    """A dense decoder's parameters as `load_pretrained` with `quant` reads them.

    Leaves that are quantized already stay as they are.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> ids = jnp.ones((1, 8), jnp.int32)
        >>> params = CausalLM(config).init(jax.random.key(0), ids)["params"]
        >>> layers = quantize_params(params, QuantConfig())["model"]["layers"]
        >>> layers["mlp"]["up_proj"]["kernel"].format
        'nf4'
    """

    family = _family_of(params)

    def leaf(path: str, x: Any) -> Any:
        own = quant_of(path, quant, family)
        if own is None or isinstance(x, QuantizedTensor):
            return x
        return quantize(
            x, own, stacked=stacked_axes(path, family), contracting=contracted_axes(path)
        )

    return map_with_path(leaf, params)


@functools.lru_cache(maxsize=16)
def _shapes(config: ModelConfig) -> Params:
    """What the module itself asks for."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(CausalLM(config).init, jax.random.key(0), ids)["params"]


def quant_of(path: str, quant: QuantConfig | None, family: Family) -> QuantConfig | None:
    """How a leaf is kept: kernels of the blocks, the embedding and the head each have a format."""
    if quant is None:
        return None
    if stacked_axes(path, family):
        return quant.of(quant.format) if is_kernel(path) else None
    if path == family.table:
        return quant.of(quant.embedding)
    return quant.of(quant.head) if path == family.head_kernel else None


def stacked_axes(path: str, family: Family) -> int:
    """How many axes of layers a leaf carries."""
    return int(stack_of(path, (family.stack,)) is not None)


def contracted_axes(path: str) -> int | tuple[int, ...]:
    """A table's rows are quantized along their own length."""
    return 1 if is_kernel(path) else (1,)


def _family_of(params: Params) -> Family:
    """The family whose embedding is in a tree; those that share its path share all that is asked.

    Raises:
        InputError: if there is none.
    """
    paths = {path for path, _ in leaves_with_path(params)}
    for family in FAMILIES.values():
        if family.table in paths:
            return family
    raise InputError("quantize_params: the tree is that of no known decoder")


def stored_shape(
    path: str, x: jax.ShapeDtypeStruct, quant: QuantConfig | None, family: Family
) -> Any:
    """The abstract leaf that an abstract weight becomes."""
    if quant is None:
        return x
    stacked, contracting = stacked_axes(path, family), contracted_axes(path)
    return jax.eval_shape(lambda x: quantize(x, quant, stacked=stacked, contracting=contracting), x)
