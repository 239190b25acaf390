"""What a Flax layer contracts: one description for Dense, DenseGeneral and Einsum."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Axes of y = x·W: `inputs` of x meet `kernel` of W, pair by pair.

    `output` orders y's axes, given as x's free axes followed by W's free axes.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]


def contraction_of(module: nn.Module, ndim: int, args: tuple[Any, ...]) -> Contraction | None:
    """The contraction of a layer called on an input of `ndim` axes.

    None if it is no such layer, or computes something else (a batch axis shared by input
    and kernel, a product function of the user's own).  A subclass of a layer may compute
    anything, so only the exact types count.

    Example:
        >>> contraction_of(nn.Einsum((8, 2, 4), "btd,dnh->btnh"), 3, ())
        Contraction(inputs=(2,), kernel=(0,), output=(0, 1, 2, 3))
    """
    if getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None):
        return None
    if type(module) is nn.Dense:
        return Contraction((ndim - 1,), (0,), tuple(range(ndim)))
    if type(module) is nn.DenseGeneral and not _as_tuple(module.batch_dims):
        axes = tuple(sorted(axis % ndim for axis in _as_tuple(module.axis)))
        rank = ndim - len(axes) + len(_as_tuple(module.features))
        return Contraction(axes, tuple(range(len(axes))), tuple(range(rank)))
    if type(module) is nn.Einsum:
        return _einsum(args[0] if args else module.einsum_str, ndim)
    return None


def _einsum(equation: str | None, ndim: int) -> Contraction | None:
    if equation is None or "->" not in equation:
        return None
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    spelled = inputs.replace("...", "")
    # Capital Greek letters stand for the axes behind an ellipsis: einsum itself takes Latin.
    hidden = "".join(chr(0x391 + i) for i in range(ndim - len(spelled)))
    inputs, output = inputs.replace("...", hidden), output.replace("...", hidden)
    contracted = [c for c in kernel if c not in output]
    features = [c for c in kernel if c in output]
    free = [c for c in inputs if c not in contracted]
    distinct = all(len(set(labels)) == len(labels) for labels in (inputs, kernel, output))
    plain = set(contracted) <= set(inputs) and not set(features) & set(inputs)
    if not (distinct and plain and set(free) | set(features) == set(output)):
        return None
    return Contraction(
        tuple(inputs.index(c) for c in contracted),
        tuple(kernel.index(c) for c in contracted),
        tuple([*free, *features].index(c) for c in output),
    )


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
