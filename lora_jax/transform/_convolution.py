"""What a Flax convolution's kernel means, and what it computes with an adapter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta

from .._typing import Array
from ..lora import as_matrix, check_shapes
from ._product import Promote


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Axes and sizes of a convolution's kernel, as `KernelLayout` has them."""

    contracting: tuple[int, ...]
    window: tuple[int, ...]
    groups: int

    @property
    def turned(self) -> bool:
        """Whether the input's features are the last axis (`transpose_kernel`)."""
        return self.contracting[-1] > len(self.window)

    def kernel(self, matrix: Array) -> Array:
        """A kernel of any width from its matrix (d_in, width)."""
        kernel = matrix.reshape(*self.window, -1, matrix.shape[-1])
        return kernel.swapaxes(-1, -2) if self.turned else kernel

    def adapted(self, param: Any) -> Any:
        """An adapted kernel that knows its axes.

        Raises:
            InputError: if its factors do not fit.
        """
        param = dataclasses.replace(param, contracting=self.contracting)
        check_shapes(param)
        return param


def convolution_of(module: Any, kind: type | None = None) -> Convolution | None:
    """What a convolution's kernel means; None if the module is none.

    A subclass, and `ConvLocal` with a kernel for every place, may compute anything.

    Args:
        module: A layer of Linen or NNX.
        kind: Its class, if not `type(module)`.

    Example:
        >>> convolution_of(nn.Conv(8, (3, 5), feature_group_count=2))
        Convolution(contracting=(0, 1, 2), window=(3, 5), groups=2)
        >>> convolution_of(nn.ConvTranspose(8, (3,), transpose_kernel=True)).contracting
        (0, 2)
    """
    if (kind or type(module)) not in (nn.Conv, nn.ConvTranspose, nnx.Conv, nnx.ConvTranspose):
        return None
    size = module.kernel_size
    window = (size,) if isinstance(size, int) else tuple(size)
    axes = len(window)
    features_in = axes + getattr(module, "transpose_kernel", False)
    return Convolution(
        (*range(axes), features_in), window, getattr(module, "feature_group_count", 1)
    )


def is_linear_in_kernel(module: Any) -> bool:
    """Whether a convolution's output is known to be linear in its kernel as it is kept.

    A mask lies over the kernel, not over its factors; a function of the user's own may be any.
    """
    usual = (None, jax.lax.conv_general_dilated)
    own = ("mask", "conv_general_dilated", "conv_general_dilated_cls", "preferred_element_type")
    return all(any(getattr(module, name, None) is x for x in usual) for name in own)


def convolved(
    param: Any,
    x: Array,
    convolution: Convolution,
    bias: Any,
    promote: Promote,
    convolve: Callable[[Array, Array], Array],
) -> Array:
    """A convolution's output in factored form.

    Args:
        param: An adapted kernel.
        x: The layer's input.
        convolution: What its kernel means.
        bias: The layer's own, or None.
        promote: Called with (x, an empty array of the kernel's dtype, bias).
        convolve: The layer's own convolution of an input with a kernel of any width, without a
            bias: its strides, paddings and dilations are not written again here.
    """
    param = convolution.adapted(param)
    base = meta.unbox(param.base)
    x, _, bias = promote(x, jnp.zeros((), base.dtype), meta.unbox(bias))
    # Rows that have an adapter each are those of the first axis: a single example gets one.
    lacking = max(len(convolution.window) + 2 - x.ndim, 0)

    def by_matrix(x: Array, matrix: Array) -> Array:
        return convolve(x, convolution.kernel(matrix))

    y = param.convolution(
        x.reshape(*(1,) * lacking, *x.shape),
        as_matrix(base, convolution.contracting),
        by_matrix,
        convolution.groups,
    )
    y = y.reshape(y.shape[lacking:])
    return y if bias is None else y + bias
