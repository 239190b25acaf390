"""What a kernel's axes mean: which are contracted, and which number layers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .._errors import InputError
from .._tree import is_below, layer_paths


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """The axes of one kernel.

    Args:
        contracting: Axes of a single layer's kernel that meet the input; the others make
            the output.  Empty for a layer that is no plain contraction, such as one with a kernel
            for every place: `"all-linear"` leaves it out.
        stack: Path of the module whose parameters carry a leading layer axis (as under
            `nn.scan`; `""` for the outermost), or None.
        experts: Whether the first axis of a single layer's parameter numbers experts, each with
            a matrix and an adapter of its own; `contracting` then counts the axes behind it.
            Experts that `nn.vmap` makes of whole modules may be a `stack` instead.
        window: Sizes of a convolution's window; its axes and that of the input's features are
            the contracted ones, in this order.  `"all-linear"` leaves convolutions out.
        groups: Into how many groups a convolution divides its input features; the kernel has the
            axis of one group.

    Example:
        >>> query = KernelLayout(contracting=(0,))      # (d, heads, head_dim)
        >>> output = KernelLayout(contracting=(0, 1))   # (heads, head_dim, d)
        >>> layers = KernelLayout(stack="model/layers")  # (layers, d_in, d_out)
        >>> up = KernelLayout(contracting=(0,), experts=True)    # (experts, d_in, d_out)
        >>> down = KernelLayout(contracting=(1,), experts=True)  # (experts, d_out, d_in)
        >>> conv = KernelLayout(contracting=(0, 1, 2), window=(3, 3))  # (3, 3, d_in, d_out)
    """

    contracting: tuple[int, ...] | None = None
    stack: str | None = None
    experts: bool = False
    window: tuple[int, ...] | None = None
    groups: int = 1

    @property
    def leading_axes(self) -> int:
        """How many axes stand in front of a single matrix: of layers, of experts."""
        return (self.stack is not None) + self.experts


Layouts = Mapping[str, KernelLayout]
"""From the path of a parameter, or of a module above it, to its layout."""


def rule_for(layouts: Layouts | None, path: str) -> KernelLayout:
    """The layout with the longest path at or above `path`; an empty one without any."""
    rules = [p for p in layouts or {} if is_below(path, p)]
    return (layouts or {})[max(rules, key=len)] if rules else KernelLayout()


def contracting_axes(contracting: tuple[int, ...] | None, path: str, axes: int) -> tuple[int, ...]:
    """The contracted axes of a single layer's kernel: as ruled, or the first of a matrix.

    Raises:
        InputError: for more than two axes and no rule: a shape alone does not tell.
    """
    if contracting:
        return contracting
    if axes == 2:
        return (0,)
    if contracting == ():
        raise InputError(
            f"{path} has {axes} axes and belongs to a layer that is no plain contraction (a"
            " subclass of one, say); exclude it, or say which axes make up its input:"
            f' lora_linen(module, layouts={{"{path}": KernelLayout(contracting=...)}})'
        )
    top = path.split("/")[0]
    raise InputError(
        f"{path} has {axes} axes, and a shape alone does not tell which are contracted; pass"
        " layouts=lora_linen(module).layouts(params, *inputs), or a rule such as"
        f' {{"{path}": KernelLayout(contracting=(0,))}} or, for layers stacked by nn.scan,'
        f' {{"{top}": KernelLayout(stack="{top}")}} or, for experts (experts, d_in, d_out),'
        f' {{"{path}": KernelLayout(contracting=(0,), experts=True)}}, or exclude it'
    )


def matrix_shape(shape: tuple[int, ...], contracting: tuple[int, ...]) -> tuple[int, int]:
    """(d_in, d_out) of a single layer's kernel.

    Example:
        >>> matrix_shape((4, 16, 64), (0, 1))
        (64, 64)
    """
    d_in = math.prod(shape[axis] for axis in contracting)
    return d_in, math.prod(shape) // max(d_in, 1)


def as_matrix(kernel: Any, contracting: tuple[int, ...]) -> Any:
    """A single layer's kernel as (d_in, d_out).

    Example:
        >>> import numpy as np
        >>> as_matrix(np.zeros((4, 16, 64)), (0, 1)).shape
        (64, 64)
    """
    features = tuple(i for i in range(kernel.ndim) if i not in contracting)
    shape = matrix_shape(kernel.shape, contracting)
    return kernel.transpose(*contracting, *features).reshape(shape)


def paths_of_layers(path: str, layout: KernelLayout, shape: tuple[int, ...]) -> list[str]:
    """Module paths of the single layers behind a kernel of this (stacked) shape."""
    return layer_paths(path, layout.stack, shape[0] if layout.stack is not None else 1)
