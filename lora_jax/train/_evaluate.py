"""Held-out loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .._errors import InputError
from .._typing import Array, Params
from ..transform import LoraLinen
from ._step import batch_loss, on_mesh


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per trained token, over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def make_eval_step(
    model: LoraLinen, *, chunk: int = 1024, mesh: Any = None
) -> Callable[[Params, Params], tuple[Array, Array]]:
    """The jitted `(params, batch) -> (summed loss, trained tokens)`; there is no dropout.

    The same model gets the same function again, so that it is compiled once.
    """
    try:
        return _eval_step(model, chunk, mesh)
    except TypeError:  # layouts in a dict have no hash
        return _eval_step.__wrapped__(model, chunk, mesh)


@functools.lru_cache(maxsize=8)
def _eval_step(
    model: LoraLinen, chunk: int, mesh: Any
) -> Callable[[Params, Params], tuple[Array, Array]]:
    return jax.jit(on_mesh(mesh, lambda params, batch: batch_loss(model, params, batch, chunk)))


def evaluate(
    eval_step: Callable[[Params, Params], tuple[Array, Array]],
    params: Params,
    batches: Iterable[Params],
) -> Evaluation:
    """Mean loss per trained token over all batches, each token counted once.

    Raises:
        InputError: if no batch holds a trained token, or the loss is not finite.
    """
    sums = [eval_step(params, {k: v for k, v in b.items() if k != "rows"}) for b in batches]
    found = mean_loss(sums)
    if not math.isfinite(found.loss):
        raise InputError(
            "evaluate: the held-out loss is not finite; look at the weights, and at model.dtype"
        )
    return found


def mean_loss(sums: Sequence[tuple[Any, Any]]) -> Evaluation:
    """Mean loss per trained token from each batch's (summed loss, trained tokens).

    Raises:
        InputError: if there is no trained token.

    Example:
        >>> mean_loss([(3.0, 2), (1.0, 2)])
        Evaluation(loss=1.0, tokens=4)
    """
    loss = float(np.sum([np.float64(loss) for loss, _ in sums]))
    tokens = int(np.sum([int(count) for _, count in sums]))
    if not tokens:
        raise InputError("evaluate: the held-out rows hold no trained token")
    return Evaluation(loss / tokens, tokens)
