"""Held-out loss by row, so that it and its differences come with a standard error."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

from .._errors import InputError
from .._typing import Params
from ..data import Examples
from ._score import Scorer


@dataclasses.dataclass(frozen=True)
class RowLosses:
    """Loss of each row.

        loss = Σ nats / Σ tokens

    Args:
        nats: -log p, summed over a row's trained tokens.
        tokens: How many those are.

    Example:
        >>> losses = RowLosses(np.array([3.0, 1.0]), np.array([2, 2]))
        >>> losses.loss, round(losses.standard_error, 4), round(losses.perplexity, 4)
        (1.0, 0.5, 2.7183)
    """

    nats: Float[np.ndarray, " rows"]
    tokens: Int[np.ndarray, " rows"]

    @property
    def loss(self) -> float:
        """Nats per trained token, each token counted once."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def standard_error(self) -> float | None:
        """Of the loss over other rows of the kind; None of a single row.

        A ratio of two sums over rows, which are independent while a row's tokens are not:

            √(n / (n - 1) · Σ (nats - loss · tokens)²) / Σ tokens

        Source: Cochran, Sampling Techniques (1977), section 6.4; clustered by row as in
        Miller 2024, Adding Error Bars to Evals.
        """
        rows = len(self.nats)
        if rows < 2:
            return None
        residuals = self.nats - self.loss * self.tokens
        scale = math.sqrt(rows / (rows - 1))
        return float(scale * np.linalg.norm(residuals) / self.tokens.sum())

    def minus(self, other: "RowLosses") -> "RowLosses":
        """The differences on the same rows: the standard error is that of pairs, far smaller."""
        return RowLosses(self.nats - other.nats, self.tokens)


def row_losses(
    scorer: Scorer, params: Params, examples: Examples, *, batch_size: int = 8
) -> RowLosses:
    """The loss of every row, its template and mask those of training, nothing packed.

    Args:
        scorer: The model.
        params: Its parameters.
        examples: What `build_examples` gave; pieces of one text count as one row.
        batch_size: Sequences computed at a time.

    Raises:
        InputError: if a sequence is longer than the model reads, or a loss is not finite.
    """
    sequences = [(example.input_ids, example.loss_mask) for example in examples]
    scores = scorer.score(params, sequences, batch_size=batch_size)
    _, row = np.unique([example.row for example in examples], return_inverse=True)
    nats = np.bincount(row, weights=[-score.log_likelihood for score in scores])
    tokens = np.bincount(row, weights=[mask[1:].sum() for _, mask in sequences])
    if not np.isfinite(nats).all():
        raise InputError(
            f"evaluate: the loss of {np.sum(~np.isfinite(nats))} of {len(nats)} rows is not"
            " finite; look at the weights, and at model.dtype"
        )
    return RowLosses(nats, tokens.astype(np.int64))
