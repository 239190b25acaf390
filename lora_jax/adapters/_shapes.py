"""Shapes and orders of axes in PEFT's files, which are torch's.

A convolution's tensors have the features in front of the window, and its B a window of 1:
`lora_A.weight` (rank, d_in, *window), `lora_B.weight` (d_out, rank, 1, ...).
"""

import math

import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._names import is_kernel, is_transposed
from ..lora import KernelLayout


def factor_shapes(
    rank: int, d_in: int, d_out: int, layout: KernelLayout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B in a file.

    Example:
        >>> factor_shapes(2, 4, 6, KernelLayout())
        ((2, 4), (6, 2))
        >>> factor_shapes(2, 36, 6, KernelLayout(window=(3, 3)))
        ((2, 4, 3, 3), (6, 2, 1, 1))
    """
    window = layout.window or ()
    return (rank, d_in // math.prod(window), *window), (d_out, rank, *_ones(window))


def to_file(a: np.ndarray, b: np.ndarray, layout: KernelLayout) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, d_in) and B (d_out, rank) as a file has them.

    Example:
        >>> a, b = to_file(np.zeros((2, 36)), np.zeros((6, 2)), KernelLayout(window=(3, 3)))
        >>> a.shape, b.shape
        ((2, 4, 3, 3), (6, 2, 1, 1))
    """
    window = layout.window or ()
    features_last = a.reshape(len(a), *window, -1)
    return np.moveaxis(features_last, -1, 1), b.reshape(*b.shape, *_ones(window))


def from_file(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_file`."""
    return np.moveaxis(a, 1, -1).reshape(len(a), -1), b.reshape(b.shape[:2])


def magnitude_shape(d_out: int, layout: KernelLayout) -> tuple[int, ...]:
    """The shape of DoRA's lengths in a file.

    Example:
        >>> magnitude_shape(6, KernelLayout()), magnitude_shape(6, KernelLayout(window=(3, 3)))
        ((6,), (1, 6, 1, 1))
    """
    return (d_out,) if layout.window is None else (1, d_out, *_ones(layout.window))


def file_axes(path: str, axes: int, layout: KernelLayout) -> tuple[int, ...]:
    """The axes of a parameter that is kept whole, in a file's order.

    Example:
        >>> file_axes("proj/kernel", 2, KernelLayout()), file_axes("norm/scale", 1, KernelLayout())
        ((1, 0), (0,))
        >>> file_axes("conv/kernel", 4, KernelLayout((0, 1, 2), window=(3, 3)))
        (3, 2, 0, 1)
    """
    order = tuple(range(axes))
    contracting = layout.contracting
    if layout.window and contracting and is_kernel(path) and axes == len(contracting) + 1:
        (out,) = set(order) - set(contracting)
        return (out, contracting[-1], *contracting[:-1])
    return order[::-1] if is_transposed(path) else order


def check_window(where: str, path: str, d_in: int, layout: KernelLayout) -> None:
    """Refuse a window of other sizes, and groups, which PEFT's form cannot say."""
    if d_in % math.prod(layout.window or ()):
        raise InputError(
            f"{where}: {path} has {d_in} inputs, which the layout's window {layout.window} does not"
            " divide; pass the layouts the adapter was made with"
        )
    if layout.groups > 1:
        raise InputError(
            f"{where}: {path} is a convolution of {layout.groups} groups; PEFT's lora_A there reads"
            " the features of all groups, and the sum of the two is no convolution of these groups"
            " (nor can PEFT merge it): exclude it, or keep the adapter's tree in a file of your own"
        )


def check_start(path: str, layout: KernelLayout, config: LoraConfig) -> None:
    """Refuse a start that PEFT does not know of convolutions: it would not read the file."""
    init = config.init_lora_weights
    if layout.window is None or isinstance(init, bool) or init == "gaussian":
        return
    way = "make the adapter plain by without_start first"
    if not config.moves_base:
        way = "save it with config.with_usual_start()"
    raise InputError(
        f"save_adapter: {path} started with init_lora_weights={init!r}, which PEFT knows of no"
        f" convolution; {way}"
    )


def _ones(window: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(window)
