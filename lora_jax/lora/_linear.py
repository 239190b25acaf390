"""The delta of an adapter: the only place where `scaling·A·B` is computed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from .._mesh_axes import OPEN, cut, mesh_size
from .._tree import vary_together
from .._typing import Array, Key
from ..quant import QuantizedTensor, quantized_matmul


def lora_linear(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"] | QuantizedTensor,
    lora_A: Float[Array, "d_in rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
    *,
    lora_B_bias: Float[Array, " d_out"] | None = None,
    dropout_key: Key | None = None,
    dropout_rate: Float[Array, ""] | float = 0.0,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch d_out"]:
    """A linear layer with a low-rank adapter: y = x·W0 + scaling·((dropout(x)·A)·B + bias_B).

    Args:
        x: Inputs; the result has their dtype.
        kernel: The frozen weight W0, dense or in four bits.
        lora_A, lora_B: The trainable factors; cast to the inputs' dtype.
        scaling: Never trained: its gradient is zero.
        lora_B_bias: The trainable bias on B (PEFT's `lora_bias`), none by default.
        dropout_key: Without a key there is no dropout.
        dropout_rate: Share of the adapter's inputs that is zeroed.
        precision: Of the base product, as in `jax.lax.dot_general`.

    Example:
        >>> x, kernel = jnp.ones((2, 4)), jnp.zeros((4, 3))
        >>> lora_linear(x, kernel, jnp.ones((4, 1)), jnp.ones((1, 3)), 0.5)[0]
        Array([2., 2., 2.], dtype=float32)

    Source: Hu et al. 2021, equation 3.
    """
    base = base_product(x, kernel, precision)
    dropped = drop(x, dropout_key, dropout_rate)
    return base + lora_delta(dropped, lora_A, lora_B, scaling, lora_B_bias)


def base_product(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"] | QuantizedTensor,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch d_out"]:
    """x·W0 for a weight that is dense or in four bits."""
    if isinstance(kernel, QuantizedTensor):
        return quantized_matmul(x, kernel, precision=precision)
    return jnp.dot(x, kernel.astype(x.dtype), precision=precision)


def lora_delta(
    x: Float[Array, "*batch d_in"],
    lora_A: Float[Array, "d_in rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
    lora_B_bias: Float[Array, " d_out"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """scaling·((x·A)·B + bias_B), with a gradient that keeps its thin products fast.

    Reverse mode only; the scaling gets no gradient.

    Example:
        >>> lora_delta(jnp.ones((2, 4)), jnp.ones((4, 1)), jnp.ones((1, 3)), 0.5).shape
        (2, 3)
    """
    scaling = jax.lax.stop_gradient(jnp.asarray(scaling, jnp.float32))
    factors = lora_A.astype(x.dtype), lora_B.astype(x.dtype)
    delta = _delta(*vary_together(x, *factors, scaling))
    if lora_B_bias is None:
        return delta
    return delta + (scaling * lora_B_bias.astype(jnp.float32)).astype(x.dtype)


def look_up_delta(
    ids: Int[Array, "*batch"],
    lora_A: Float[Array, "vocab rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, "*batch d_out"]:
    """scaling·A[ids]·B, the delta of an embedding's rows.

    Example:
        >>> look_up_delta(jnp.array([0, 2]), jnp.ones((4, 1)), jnp.ones((1, 3)), 0.5).shape
        (2, 3)
    """
    scaling = jax.lax.stop_gradient(jnp.asarray(scaling, jnp.float32))
    rows = jnp.take(lora_A, ids, axis=0)
    return (scaling * rows).astype(rows.dtype) @ lora_B


def convolution_delta(
    x: Array,
    lora_A: Float[Array, "window_and_features rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
    convolve: Callable[[Array, Array], Array],
    groups: int = 1,
    lora_B_bias: Float[Array, " d_out"] | None = None,
) -> Array:
    """scaling·((x∗A)·B + bias_B); of groups each has the same A, and its own columns of B.

    Example: see `lora_convolution`.
    """
    scaling = jax.lax.stop_gradient(jnp.asarray(scaling, jnp.float32))
    a = (scaling * lora_A).astype(x.dtype)  # not the sum, which may be too large for 16 bits
    h = convolve(x, jnp.tile(a, groups))
    h = h.reshape(*h.shape[:-1], groups, -1)
    b = lora_B.astype(h.dtype).reshape(len(lora_B), groups, -1)
    delta = jnp.einsum("...gr,rgo->...go", h, b).reshape(*h.shape[:-2], -1)
    if lora_B_bias is None:
        return delta
    return delta + (scaling * lora_B_bias.astype(jnp.float32)).astype(delta.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def dense_delta(
    lora_A: Float[Array, "*stack d_in rank"],
    lora_B: Float[Array, "*stack rank d_out"],
    scaling: Float[Array, "*stack"],
    kernel_shape: tuple[int, ...],
    contracting: tuple[int, ...],
) -> Float[Array, "..."]:
    """scaling·A·B in float32, in the kernel's own shape and order of axes.

    Args:
        kernel_shape: Shape of a single layer's kernel.
        contracting: Its axes that meet the input.

    Example:
        >>> one = jnp.ones((4, 1)), jnp.ones((1, 6)), jnp.float32(2)
        >>> dense_delta(*one, (2, 4, 3), (1,)).shape
        (2, 4, 3)
    """
    features = tuple(i for i in range(len(kernel_shape)) if i not in contracting)
    order = (*contracting, *features)
    # On TPU a default float32 product is rounded to bfloat16; a merge must not be.
    delta = jnp.matmul(
        lora_A.astype(jnp.float32), lora_B.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    delta = delta * jax.lax.stop_gradient(scaling).astype(jnp.float32)[..., None, None]
    stack = delta.shape[:-2]
    delta = delta.reshape(*stack, *(kernel_shape[i] for i in order))
    back = [order.index(i) + len(stack) for i in range(len(order))]
    return delta.transpose(*range(len(stack)), *back)


def drop(x: Array, key: Key | None, rate: Array | float) -> Array:
    """Zero a share `rate` of the entries and scale up the others; nothing without a key."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@jax.custom_vjp
def _delta(x: Array, a: Array, b: Array, scaling: Array) -> Array:
    return _scaled(x, a, scaling) @ b


def _delta_forward(x: Array, a: Array, b: Array, scaling: Array):
    h = _scaled(x, a, scaling)
    # As it came: reshaped here, the input that three projections share would be kept three times.
    return h @ b, (x, a, b, scaling, h)


def _delta_backward(residuals, g):
    whole, a, b, scaling, h = residuals
    x, h, g = (_tokens(jnp.asarray(y)) for y in (whole, h, g))
    # As xᵀ·(g·Bᵀ) the thin products have a badly laid out left operand (5 times slower on
    # XLA:CPU); as (rank, tokens) matrices they have not.  The barriers keep XLA from turning
    # them back, by way of dA's transpose too, and from recomputing activations inside them.
    thin = _scaled(b, jnp.moveaxis(g, -1, -2), scaling), jnp.moveaxis(h, -1, -2)
    thin_g, thin_h = jax.lax.optimization_barrier(thin)
    thin_g = _by_rank(thin_g)
    da = jax.lax.optimization_barrier(_over_tokens(thin_g, x)).T
    dx = (jnp.moveaxis(thin_g, -1, -2) @ a.T).reshape(whole.shape)
    return dx, da, _over_tokens(thin_h, g), jnp.zeros_like(scaling)


def _tokens(x: Array) -> Array:
    """All tokens of a batch along one axis; where devices hold parts of a row, its axes stay."""
    return x if mesh_size("sequence") > 1 and x.ndim > 2 else x.reshape(-1, x.shape[-1])


def _by_rank(thin: Array) -> Array:
    """(..., rank, seq) cut by its rank over `tensor`, where that divides it.

    Where a layer's columns are cut, the gradient by x is then a sum over devices for the base's
    product and the adapter's alike, and compilers for GPUs and TPUs add up those of all layers that
    share x before they exchange them.
    """
    if mesh_size("tensor") == 1 or thin.shape[-2] % mesh_size("tensor"):
        return thin

    def split(x: Array) -> Array:
        return cut(x, *[OPEN] * (x.ndim - 2), "tensor", OPEN)

    return jax.lax.platform_dependent(thin, cpu=lambda x: x, default=split)


def _over_tokens(thin: Array, x: Array) -> Array:
    """(..., rank, seq)·(..., seq, d), summed over rows."""
    rows = tuple(range(x.ndim - 2))
    return jax.lax.dot_general(thin, x, (((*rows, x.ndim - 1), (*rows, x.ndim - 2)), ((), ())))


def _scaled(x: Array, y: Array, scaling: Array) -> Array:
    """scaling·x·y: the scaling is not rounded to 16 bits, nor a large sum before it is scaled."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (scaling * jnp.matmul(x, y, preferred_element_type=wide)).astype(x.dtype)


_delta.defvjp(_delta_forward, _delta_backward)
