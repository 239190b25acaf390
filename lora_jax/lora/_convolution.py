"""A convolution with a low-rank adapter, its kernel taken as the matrix (window · d_in, d_out)."""

from collections.abc import Callable

from jaxtyping import Float

from .._typing import Array, Key
from ._dora import column_scale, dora_sum
from ._linear import convolution_delta, drop

Convolve = Callable[[Array, Array], Array]
"""From an input and a kernel as a matrix to the layer's convolution, whatever its other numbers."""


def lora_convolution(
    x: Float[Array, "*batch_and_space d_in"],
    kernel: Float[Array, "window_and_features d_out"],
    lora_A: Float[Array, "window_and_features rank"],
    lora_B: Float[Array, "rank d_out"],
    scaling: Float[Array, ""] | float,
    convolve: Convolve,
    *,
    groups: int = 1,
    magnitude: Float[Array, " d_out"] | None = None,
    lora_B_bias: Float[Array, " d_out"] | None = None,
    dropout_key: Key | None = None,
    dropout_rate: Float[Array, ""] | float = 0.0,
) -> Float[Array, "*batch_and_places d_out"]:
    """A convolution with a low-rank adapter: y = x∗W0 + scaling·((dropout(x)∗A)·B + bias_B).

    It is linear in its kernel: x∗(A·B) = (x∗A)·B, whatever its stride, padding and dilation.  With
    a magnitude (DoRA) it is as `dora_linear`.

    Args:
        x: Inputs; the result has their dtype, or that which `convolve` gives them.
        kernel: The frozen weight W0; window_and_features counts those of one group.
        lora_A, lora_B: The trainable factors.
        scaling: Never trained: its gradient is zero.
        convolve: The layer without its bias, `(x, matrix) -> y`, for kernels of any width.
        groups: Into how many groups `convolve` divides the features of input and output.
        magnitude: The trainable length of every column, float32.
        lora_B_bias: The trainable bias on B, none by default.
        dropout_key: Without a key there is no dropout.
        dropout_rate: Share of the adapter's inputs that is zeroed.

    Example:
        >>> import jax.numpy as jnp
        >>> def pairs(x, kernel):  # a window of 2 over one feature
        ...     return jnp.stack([x[:-1, 0], x[1:, 0]], axis=-1) @ kernel
        >>> x, a, b = jnp.arange(3.0)[:, None], jnp.ones((2, 1)), jnp.ones((1, 3))
        >>> lora_convolution(x, jnp.zeros((2, 3)), a, b, 0.5, pairs)[:, 0].tolist()
        [0.5, 1.5]

    Source: Hu et al. 2021, equation 3; the factors are those of PEFT's convolutions.
    """

    def delta(x: Array) -> Array:
        return convolution_delta(x, lora_A, lora_B, scaling, convolve, groups, lora_B_bias)

    def product(x: Array) -> Array:
        return convolve(x, kernel)

    dropped = drop(x, dropout_key, dropout_rate)
    if magnitude is None:
        return product(x) + delta(dropped)
    c = column_scale(kernel, lora_A, lora_B, scaling, magnitude)
    return dora_sum(product, delta, x, None if dropout_key is None else dropped, c)
