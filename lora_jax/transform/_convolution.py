"""What a Linen convolution's kernel means, and the same convolution with other kernels."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta

from .._typing import Array
from ..lora import as_matrix, check_shapes
from ._product import ADAPTED


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


def convolution_of(module: nn.Module) -> Convolution | None:
    """What a convolution's kernel means; None if the module is none.

    A subclass, and `ConvLocal` with a kernel for every place, may compute anything.

    Example:
        >>> convolution_of(nn.Conv(8, (3, 5), feature_group_count=2))
        Convolution(contracting=(0, 1, 2), window=(3, 5), groups=2)
        >>> convolution_of(nn.ConvTranspose(8, (3,), transpose_kernel=True)).contracting
        (0, 2)
    """
    if type(module) not in (nn.Conv, nn.ConvTranspose):
        return None
    size = module.kernel_size
    window = (size,) if isinstance(size, int) else tuple(size)
    axes = len(window)
    features_in = axes + getattr(module, "transpose_kernel", False)
    return Convolution(
        (*range(axes), features_in), window, getattr(module, "feature_group_count", 1)
    )


def convolved(param: Any, x: Array, convolution: Convolution, module: Any) -> Array | None:
    """What a Linen convolution computes from an adapted kernel; None where it opens it itself."""
    if not isinstance(param, ADAPTED):
        return None
    param = dataclasses.replace(param, contracting=convolution.contracting)
    check_shapes(param)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    if not _is_linear_in_kernel(module):
        own = {"kernel": param.unbox(), "bias": bias}
        return module.clone(parent=None).apply({"params": own}, x)
    base = meta.unbox(param.base)
    x, _, bias = module.promote_dtype(
        x, jnp.zeros((), base.dtype), meta.unbox(bias), dtype=module.dtype
    )
    kernel = as_matrix(base, convolution.contracting)
    # Rows that have an adapter each are those of the first axis: a single example gets one.
    lacking = max(len(convolution.window) + 2 - x.ndim, 0)
    one = functools.partial(_convolve, module, convolution)
    y = param.convolution(x.reshape(*(1,) * lacking, *x.shape), kernel, one, convolution.groups)
    y = y.reshape(y.shape[lacking:])
    return y if bias is None else y + bias


def _is_linear_in_kernel(module: Any) -> bool:
    """Whether the output is known to be linear in the kernel as it is kept.

    A mask lies over the kernel, not over its factors; a function of the user's own may be any.
    """
    own = ("mask", "conv_general_dilated", "conv_general_dilated_cls")
    return all(getattr(module, name, None) is None for name in own)


def _convolve(module: Any, convolution: Convolution, x: Array, matrix: Array) -> Array:
    """The module's convolution without its bias, with a kernel of any width given as a matrix.

    Flax itself computes it: its strides, paddings and dilations are not written again here.
    """
    width = matrix.shape[-1]
    kernel = matrix.reshape(*convolution.window, -1, width)
    if convolution.turned:
        kernel = kernel.swapaxes(-1, -2)
    layer = module.clone(parent=None, features=width, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)
