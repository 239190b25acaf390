"""What a known layer computes from an adapted or quantized parameter, in Linen and in NNX alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from .._typing import Array
from ..lora import LoraParam, RowParam, TokenParam, as_matrix, base_product, check_shapes
from ..quant import QuantizedTensor, look_up, quantized_matmul
from ._contraction import Contraction

ADAPTED = (LoraParam, RowParam)
"""A parameter with one adapter, or with one for each row of a batch."""
KNOWN = (*ADAPTED, TokenParam, QuantizedTensor)
"""What layers compute with as it is."""
Promote = Callable[..., Any]
"""Brings arrays to one dtype by a layer's own rule."""


def product(
    param: Any, x: Array, contraction: Contraction, bias: Any, promote: Promote, precision: Any
) -> Array | None:
    """The layer's output in factored form; None where only the dense weight will do.

    Args:
        param: One of `KNOWN`.
        x: The layer's input, its axes as `contraction` says.
        contraction: Which axes meet, and the order of the output's.
        bias: The layer's own, or None.
        promote: Called with (x, an empty array of the weight's dtype, bias).
        precision: As in `jax.lax.dot_general`.
    """
    if isinstance(param, TokenParam) and contraction.kernel != (0,):
        return None
    base = _base_of(param)
    if not _is_matrix(base, contraction.kernel):
        base = meta.unbox(base)
    quantized = isinstance(base, QuantizedTensor)
    kernel = base if quantized else as_matrix(base, contraction.kernel)
    x, _, bias = promote(x, jnp.zeros((), base.dtype), meta.unbox(bias))
    free = tuple(i for i in range(x.ndim) if i not in contraction.inputs)
    features = tuple(i for i in range(base.ndim) if i not in contraction.kernel)
    flat = x.transpose(*free, *contraction.inputs).reshape(*(x.shape[i] for i in free), -1)
    if isinstance(param, ADAPTED):
        check_shapes(dataclasses.replace(param, contracting=contraction.kernel))
        y = param.linear(flat, kernel, precision)
    elif isinstance(param, TokenParam):
        y = param.outputs(flat, base_product(flat, kernel, precision), precision)
    elif quantized:
        y = quantized_matmul(flat, kernel, precision=precision)
    else:
        return None
    y = y.reshape(*(x.shape[i] for i in free), *(base.shape[i] for i in features))
    y = y.transpose(contraction.output)
    if bias is None:
        return y
    shape = [n if i >= len(free) else 1 for i, n in zip(contraction.output, y.shape, strict=True)]
    return y + bias.reshape(shape)


def looked_up(param: Any, ids: Array, promote: Promote) -> Array:
    """An embedding's rows. `promote` is called with an empty array of the table's dtype."""
    base = _base_of(param)
    (empty,) = promote(jnp.zeros((), base.dtype))
    if _is_matrix(base, (1,)):
        rows = look_up(base, ids, empty.dtype)
    else:
        rows = jnp.take(meta.unbox(base).astype(empty.dtype), ids, axis=0)
    if isinstance(param, TokenParam):
        return param.rows(jnp.asarray(ids), rows)
    if not isinstance(param, ADAPTED):
        return rows
    return param.look_up(jnp.asarray(ids), rows, meta.unbox(base))


def attended(param: Any, query: Array, promote: Promote) -> Array:
    """Logits of a head that shares its table with an embedding.

    `promote` is called with (query, an empty array of the table's dtype).
    """
    base = _base_of(param)
    if isinstance(param, ADAPTED) and param.untied:
        param = base
    query, _ = promote(query, jnp.zeros((), base.dtype))
    if isinstance(param, ADAPTED):
        query = param.scaled(query, meta.unbox(base))
    if _is_matrix(base, (1,)):
        logits = quantized_matmul(query, base)
    else:
        logits = jnp.dot(query, meta.unbox(base).astype(query.dtype).T)
    if isinstance(param, TokenParam):
        return param.outputs(query, logits)
    return logits + param.transposed(query) if isinstance(param, ADAPTED) else logits


def _base_of(param: Any) -> Any:
    return param.base if isinstance(param, (*ADAPTED, TokenParam)) else param


def _is_matrix(base: Any, contracting: tuple[int, ...]) -> bool:
    """Whether a quantized kernel is flattened as this layer needs it: that cannot be changed."""
    return isinstance(base, QuantizedTensor) and contracting == base.contracting
