"""`x·W` with a frozen 4-bit `W`, dequantized again for the gradient rather than kept."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._errors import InputError
from .._typing import Array
from ._tensor import QuantizedTensor, dequantize


def quantized_matmul(
    x: Float[Array, "*batch d_in"], q: QuantizedTensor, *, precision: Any = None
) -> Float[Array, "*batch d_out"]:
    """Multiply by a quantized kernel, flattened to `(d_in, d_out)`.

        y = x·dequantize(q),    dx = dy·dequantize(q)ᵀ

    The kernel is frozen: it gets no gradient. Only its four bits are kept for the backward
    pass, which dequantizes again.

    Args:
        x: Inputs; the kernel is dequantized to their dtype.
        q: One kernel without stack axes (scan or vmap over those).
        precision: As in `jax.lax.dot_general`.

    Returns:
        Outputs in the dtype of `x`.

    Raises:
        InputError: if `q` is stacked or the last axis of `x` is not d_in.

    Example:
        >>> from lora_jax.quant import quantize
        >>> quantized_matmul(jnp.ones((5, 64)), quantize(jnp.ones((64, 4, 2)))).shape
        (5, 8)

    Source: Dettmers et al. 2023, "QLoRA", equation 5.
    """
    if q.codes.ndim != 3:
        raise InputError(
            f"quantized_matmul: q must hold one kernel, got a stack {q.shape};"
            " use jax.vmap or a scan over its leading axes"
        )
    if x.shape[-1] != q.d_in:
        raise InputError(
            f"quantized_matmul: the last axis of x {x.shape} must be d_in={q.d_in} of a"
            f" kernel {q.kernel_shape}; flatten its {q.contracting} contracted axes in x"
        )
    return _matmul(precision, x, q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    return jnp.matmul(x, _matrix(q, x.dtype), precision=precision)


def _forward(precision: Any, x: Array, q: QuantizedTensor) -> tuple[Array, QuantizedTensor]:
    return _matmul(precision, x, q), q


def _backward(precision: Any, q: QuantizedTensor, gradient: Array) -> tuple[Array, None]:
    # Without the barrier the compiler finds the forward pass's dense weight equal, and keeps it.
    # XLA:CPU drops barriers before it looks: there only a scan keeps the two passes apart.
    gradient, q = jax.lax.optimization_barrier((gradient, q))
    return jnp.matmul(gradient, _matrix(q, gradient.dtype).T, precision=precision), None


_matmul.defvjp(_forward, _backward)


def _matrix(q: QuantizedTensor, dtype: Any) -> Array:
    return dequantize(q, dtype).reshape(q.d_in, q.d_out)
