"""Log-likelihoods of chosen tokens, row by row: one jitted program of few shapes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._errors import InputError
from .._typing import Params
from ..models import ModelConfig
from ..transform import LoraLinen

Chosen = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
"""Token ids, and which of them count."""


class Score(NamedTuple):
    """Sum of log p over the chosen tokens, and whether each of them was the likeliest."""

    log_likelihood: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A causal model, cut in two so that the logits of few tokens exist at a time.

    Args:
        states: `(params, ids (batch, seq)) -> (batch, seq, d)`.
        head: `(params, (..., d)) -> logits (..., vocab)`.
        max_length: Tokens that the model reads at most.
        chunk: Tokens whose logits exist at one time (at least one of each row).
    """

    states: Callable[[Params, Array], Array]
    head: Callable[[Params, Array], Array]
    max_length: int
    chunk: int = 1024

    @classmethod
    def of_decoder(cls, model: LoraLinen, config: ModelConfig, *, chunk: int = 1024) -> "Scorer":
        """The built-in decoder, wrapped by `lora_linen`."""

        def states(params: Params, ids: Array) -> Array:
            return model.apply({"params": params}, ids, method="hidden_states")[0]

        def head(params: Params, hidden: Array) -> Array:
            return model.apply({"params": params}, hidden, method="logits")

        return cls(states, head, config.max_position_embeddings, chunk)

    @classmethod
    def of_apply(cls, apply: Callable[[Params, Array], Array], max_length: int) -> "Scorer":
        """Any function from parameters and ids (batch, seq) to logits (batch, seq, vocab).

        Example:
            >>> uniform = Scorer.of_apply(lambda params, ids: jnp.zeros((*ids.shape, 4)), 16)
            >>> [score] = uniform.score({}, [([1, 2, 0], [False, True, True])])
            >>> round(score.log_likelihood, 4), score.greedy          # 2 log 1/4
            (-2.7726, False)
        """
        return cls(apply, lambda params, logits: logits, max_length)

    def score(
        self,
        params: Params,
        sequences: Sequence[Chosen],
        *,
        batch_size: int = 8,
    ) -> list[Score]:
        """Σ log p(token | what stands before) over the chosen tokens of each sequence.

        Rows are padded on the right, where no token looks, to powers of two (`max_length` at
        most), the longest first: so the program is compiled once for each such length.

        Args:
            params: The model's parameters.
            sequences: Token ids of each, and which of them count; the first never does.
            batch_size: Rows computed at a time.

        Returns:
            A score for each sequence, in their order.

        Raises:
            InputError: if a sequence is longer than the model reads, or `batch_size` is not
                positive.
        """
        if batch_size < 1:
            raise InputError(f"evaluate: batch_size must be at least 1, got {batch_size}")
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
        rows = min(batch_size, power_of_two(len(sequences)))
        chunks = [order[start : start + rows] for start in range(0, len(order), rows)]
        found = [
            self.program(params, *self._batch([sequences[i] for i in chunk], rows))
            for chunk in chunks
        ]
        scores: dict[int, Score] = {}
        for chunk, (sums, greedy) in zip(chunks, jax.device_get(found), strict=True):
            ours = zip(chunk, sums.tolist(), greedy.tolist(), strict=False)  # without the padding
            scores |= {i: Score(total, likeliest) for i, total, likeliest in ours}
        return [scores[i] for i in range(len(sequences))]

    @functools.cached_property
    def program(self) -> Any:
        """The jitted `(params, ids, targets, mask) -> (sums, greedy)`, all of them by row."""
        return jax.jit(self._score_batch)

    def _batch(
        self, sequences: Sequence[Chosen], rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        longest = max(len(ids) for ids, _ in sequences) - 1
        if longest > self.max_length:
            raise InputError(
                f"evaluate: a sequence of {longest + 1} tokens is longer than the"
                f" {self.max_length + 1} that the model reads and predicts; cut it"
            )
        width = min(power_of_two(longest, least=16), self.max_length)
        ids, targets = np.zeros((2, rows, width), np.int32)
        mask = np.zeros((rows, width), bool)
        for row, (tokens, chosen) in enumerate(sequences):
            length = len(tokens) - 1
            ids[row, :length], targets[row, :length] = tokens[:-1], tokens[1:]
            mask[row, :length] = chosen[1:]
        return ids, targets, mask

    def _score_batch(
        self,
        params: Params,
        ids: Int[Array, "rows width"],
        targets: Int[Array, "rows width"],
        mask: Bool[Array, "rows width"],
    ) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
        rows, width = ids.shape
        length = min(max(self.chunk // rows, 1), width)

        def pieces(x: Array) -> Array:
            """(pieces, rows, length, ...)"""
            x = jnp.pad(x, ((0, 0), (0, -width % length), *[(0, 0)] * (x.ndim - 2)))
            return x.reshape(rows, -1, length, *x.shape[2:]).swapaxes(0, 1)

        def score(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            states, targets, mask = piece
            logits = self.head(params, states).astype(jnp.float32)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            log_p = picked - jax.nn.logsumexp(logits, axis=-1)
            likeliest = jnp.argmax(logits, axis=-1) == targets
            return jnp.sum(log_p, axis=1, where=mask), jnp.all(likeliest | ~mask, axis=1)

        def scored(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            # Of a long context the head has nothing to tell.
            nothing = jnp.zeros(rows), jnp.ones(rows, bool)
            return jax.lax.cond(jnp.any(piece[-1]), score, lambda _: nothing, piece)

        parts = pieces(self.states(params, ids)), pieces(targets), pieces(mask)
        sums, greedy = jax.lax.map(scored, parts)
        return jnp.sum(sums, axis=0), jnp.all(greedy, axis=0)


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two.

    Example:
        >>> [power_of_two(n) for n in (0, 1, 5, 8)], power_of_two(5, least=16)
        ([1, 1, 8, 8], 16)
    """
    return max(least, 1 << max(n - 1, 0).bit_length())
