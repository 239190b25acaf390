"""DoRA: the magnitude of every output learned apart from its direction."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._tree import vary_together
from .._typing import Array, Key
from ..quant import QuantizedTensor, dequantize
from ._layout import as_matrix
from ._linear import base_product, drop, lora_delta


def dora_linear(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"] | QuantizedTensor,
    lora_A: Float[Array, "d_in rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
    magnitude: Float[Array, " d_out"],
    *,
    dropout_key: Key | None = None,
    dropout_rate: Float[Array, ""] | float = 0.0,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch d_out"]:
    """A linear layer whose columns have a length of their own: y = c·(x·W0 + scaling·x·A·B).

        c = magnitude / ‖W0 + scaling·A·B‖, for each output, the norm held constant in gradients

    Under dropout the base's own output keeps all of its input, as in PEFT:
    y = x·W0 + (c - 1)·(x'·W0) + c·scaling·x'·A·B with x' = dropout(x).

    Args:
        x, kernel, lora_A, lora_B, scaling, dropout_key, dropout_rate, precision: As for
            `lora_linear`.
        magnitude: The trainable length of every column, float32.

    Example:
        >>> x, kernel = jnp.ones((2, 4)), jnp.eye(4)
        >>> dora_linear(x, kernel, jnp.zeros((4, 1)), jnp.ones((1, 4)), 0.5, 3 * jnp.ones(4))[0]
        Array([3., 3., 3., 3.], dtype=float32)

    Source: Liu et al. 2024, "DoRA", equations 5 and 11.
    """

    def product(x: Array) -> Array:
        return base_product(x, kernel, precision)

    def delta(x: Array) -> Array:
        return lora_delta(x, lora_A, lora_B, scaling)

    c = column_scale(kernel, lora_A, lora_B, scaling, magnitude)
    dropped = None if dropout_key is None else drop(x, dropout_key, dropout_rate)
    return dora_sum(product, delta, x, dropped, c)


def dora_sum(
    product: Callable[[Array], Array],
    delta: Callable[[Array], Array],
    x: Array,
    dropped: Array | None,
    c: Float[Array, " d_out"],
) -> Array:
    """A layer's product and delta with its columns scaled by c, as `dora_linear` has them."""
    if dropped is None:
        return scale_columns(product(x) + delta(x), c)
    whole = product(x)
    return (whole + (c - 1) * product(dropped) + c * delta(dropped)).astype(whole.dtype)


def scale_columns(y: Float[Array, "*batch d"], c: Float[Array, " d"]) -> Float[Array, "*batch d"]:
    """c·y in the dtype of y, which alone is kept for the gradient: float32 would take twice that.

    Example:
        >>> scale_columns(jnp.ones((2, 3), "bfloat16"), jnp.arange(3.0))[0].tolist()
        [0.0, 1.0, 2.0]
    """
    return _scaled(*vary_together(y, c))


@jax.custom_vjp
def _scaled(y: Array, c: Array) -> Array:
    return (c * y).astype(y.dtype)


def _scale_forward(y: Array, c: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scaled(y, c), (y, c)


def _scale_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    y, c = kept
    products = g.astype(jnp.float32) * y.astype(jnp.float32)
    return (c * g).astype(y.dtype), jnp.sum(products, axis=tuple(range(y.ndim - 1)))


_scaled.defvjp(_scale_forward, _scale_backward)


def column_scale(
    kernel: Any, lora_A: Array, lora_B: Array, scaling: Any, magnitude: Array
) -> Float[Array, " d_out"]:
    """magnitude / ‖W0 + scaling·A·B‖ in float32; 1 where a layer of a stack has no adapter."""
    norm = jax.lax.stop_gradient(column_norm(kernel, lora_A, lora_B, scaling))
    scale = magnitude.astype(jnp.float32) / norm
    return jnp.where(jnp.asarray(scaling) == 0, 1.0, scale)


@functools.partial(jax.jit, inline=True)
def column_norm(kernel: Any, lora_A: Array, lora_B: Array, scaling: Any) -> Float[Array, " d_out"]:
    """‖W0 + scaling·A·B‖ of every column, without the dense sum, in float32.

        ‖W0‖² + 2·scaling·Σ_r (W0ᵀ·A) ∘ Bᵀ + scaling²·Σ_r (AᵀA·B) ∘ B

    Example:
        >>> column_norm(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0)
        Array([2.236068, 2.236068], dtype=float32)
    """
    w = kernel
    if isinstance(kernel, QuantizedTensor):
        w = as_matrix(dequantize(kernel), kernel.contracting)
    a, b = lora_A.astype(jnp.float32), lora_B.astype(jnp.float32)
    s = jnp.asarray(scaling, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    # Only the products with 16-bit weights are 16 bits wide: they need no wide copy of the weight.
    wide = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    crossed = jnp.einsum(
        "io,ir->ro", w, a.astype(w.dtype), precision=wide, preferred_element_type=jnp.float32
    )
    gram = jnp.matmul(a.T, a, precision=highest)
    squared = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)
    squared += 2 * s * jnp.sum(crossed * b, axis=0)
    squared += s * s * jnp.sum(jnp.matmul(gram, b, precision=highest) * b, axis=0)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))
