"""What a Flax layer contracts: one description for layers of Linen and of NNX."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Axes of y = x·W: `inputs` of x meet `kernel` of W, pair by pair.

    `output` orders y's axes, given as x's free axes followed by W's free axes.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]


def contraction_of(
    module: Any, ndim: int, args: tuple[Any, ...], *, kind: type | None = None
) -> Contraction | None:
    """The contraction of a layer called on an input of `ndim` axes.

    None if it is no such layer, or computes something else (a batch axis shared by input
    and kernel, a product function or a type of the sum of the user's own).  A subclass of a layer
    may compute anything, so only the exact types count.

    Args:
        module: A layer of Linen or NNX.
        ndim: Axes of its input.
        args: Its other arguments.
        kind: Its class, if not `type(module)`.

    Example:
        >>> contraction_of(nn.Einsum((8, 2, 4), "btd,dnh->btnh"), 3, ())
        Contraction(inputs=(2,), kernel=(0,), output=(0, 1, 2, 3))
    """
    if any(getattr(module, name, None) not in usual for name, usual in _PRODUCTS.items()):
        return None
    kind = kind or type(module)
    if kind in (nn.Dense, nnx.Linear):
        return Contraction((ndim - 1,), (0,), tuple(range(ndim)))
    if kind is nn.DenseGeneral and not _as_tuple(module.batch_dims):
        return _general(_as_tuple(module.axis), _as_tuple(module.features), ndim)
    if kind is nnx.LinearGeneral and not module.batch_axis:
        return _general(module.axis, module.out_features, ndim)
    if kind in (nn.Einsum, nnx.Einsum):
        return _einsum(args[0] if args else module.einsum_str, ndim)
    return None


_PRODUCTS = {
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "einsum_op": (None, jnp.einsum),
    "preferred_element_type": (None,),
}
"""How a layer multiplies, and what is usual."""


def _general(axes: Sequence[int], features: Sequence[int], ndim: int) -> Contraction:
    inputs = tuple(sorted(axis % ndim for axis in axes))
    rank = ndim - len(inputs) + len(features)
    return Contraction(inputs, tuple(range(len(inputs))), tuple(range(rank)))


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
