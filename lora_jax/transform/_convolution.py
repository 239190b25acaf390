"""What a Flax convolution's kernel means, and the same convolution with another kernel."""

import dataclasses
from typing import Any

import flax.linen as nn

from .._typing import Array


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


def is_linear_in_kernel(module: Any) -> bool:
    """Whether a convolution's output is known to be linear in its kernel as it is kept.

    A mask lies over the kernel, not over its factors; a function of the user's own may be any.
    """
    own = ("mask", "conv_general_dilated", "conv_general_dilated_cls")
    return all(getattr(module, name, None) is None for name in own)


def convolve(module: Any, convolution: Convolution, x: Array, matrix: Array) -> Array:
    """The module's convolution without its bias, with a kernel of any width given as a matrix.

    Flax itself computes it: its strides, paddings and dilations are not written again here.
    """
    width = matrix.shape[-1]
    kernel = matrix.reshape(*convolution.window, -1, width)
    if convolution.turned:
        kernel = kernel.swapaxes(-1, -2)
    layer = module.clone(parent=None, features=width, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)
