"""Which token comes next: penalties, temperature, truncation and the draw, without any sorting."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from .._errors import InputError
from .._typing import Array, Key

_BLOCK = 256
"""Tokens whose probabilities are added up before one of them is drawn."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each next token is chosen; a field is one value, or a sequence with one per prompt.

    In this order: penalties, temperature, top-k, top-p, min-p.  The values are arrays in the
    compiled program, so that no change of them compiles anything.

    Args:
        temperature: What logits are divided by; 0 takes the most likely token each time.
        top_k: Sample among this many most likely tokens (and those that tie); 0 among all.
        top_p: Sample among the most likely tokens that together reach this probability.
        min_p: Leave out tokens less likely than this share of the most likely one's probability.
        repetition_penalty: Logits of tokens in the prompt or the text so far are divided by it
            where positive, else multiplied.
        presence_penalty: Subtracted from the logits of tokens in the text so far.
        frequency_penalty: Subtracted as often as the token is in the text so far.
        seed: From 0 to 2^63 - 1.  One seed gives every row a stream of random numbers of its
            own; with one seed per row, a row's text depends on nothing but its prompt and seed.

    Raises:
        InputError: if a value is out of its range.

    Example:
        >>> SamplingParams(temperature=[0.0, 0.7], top_p=0.9, seed=1).top_p
        0.9

    Source: top-p is nucleus sampling (Holtzman et al. 2020, section 3.1), min-p Nguyen et al.
    2024, the repetition penalty Keskar et al. 2019, "CTRL", section 4.1; presence and frequency
    penalties are those of OpenAI's API.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    presence_penalty: float | Sequence[float] = 0.0
    frequency_penalty: float | Sequence[float] = 0.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, (rule, holds) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not all(holds(v) for v in _several(value)):
                raise InputError(f"sampling: {name} must be {rule}, got {value!r}")

    @property
    def samples(self) -> bool:
        """Whether any row is sampled rather than greedy."""
        return any(t > 0 for t in _several(self.temperature))

    @property
    def penalizes(self) -> bool:
        """Whether any row's logits depend on what was said before by more than the model."""
        neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        return any(v != plain for n, plain in neutral.items() for v in _several(getattr(self, n)))

    def check_rows(self, count: int) -> None:
        """Refuse sequences that do not have one value for each of `count` prompts."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if np.ndim(value) == 1 and len(value) != count:
                raise InputError(
                    f"sampling: {field.name} has {len(value)} values for {count} prompts; give one"
                    " for each, or a single one"
                )


def _several(value: Any) -> list[Any]:
    return np.ravel(np.asarray(value)).tolist()


def _number(least: float, most: float, *, strictly: bool = False) -> Callable[[Any], bool]:
    return lambda v: (least < v if strictly else least <= v) and v <= most


_FINITE = float(np.finfo(np.float32).max)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("finite and at least 0", _number(0, _FINITE)),
    "top_k": ("a whole number of at least 0", lambda v: v == int(v) >= 0),
    "top_p": ("in (0, 1]", _number(0, 1, strictly=True)),
    "min_p": ("in [0, 1]", _number(0, 1)),
    "repetition_penalty": ("finite and above 0", _number(0, _FINITE, strictly=True)),
    "presence_penalty": ("finite", math.isfinite),
    "frequency_penalty": ("finite", math.isfinite),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda v: v == int(v) and 0 <= v < 2**63),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """`SamplingParams` as arrays with one value for each row of a padded batch.

    `key` is that of a row's seed, and `stream` tells rows of one seed apart.
    """

    temperature: Float[Any, " batch"]
    top_k: Int[Any, " batch"]
    top_p: Float[Any, " batch"]
    min_p: Float[Any, " batch"]
    repetition_penalty: Float[Any, " batch"]
    presence_penalty: Float[Any, " batch"]
    frequency_penalty: Float[Any, " batch"]
    key: UInt32[Any, "batch 2"]
    stream: Int[Any, " batch"]

    @classmethod
    def of(cls, params: SamplingParams, count: int, batch: int, key: Key | None) -> "RowParams":
        """Values of `count` rows, and harmless ones for what fills up the batch.

        A seed comes before `key`; without either it is 0.
        """
        params.check_rows(count)

        def spread(value: Any, dtype: Any) -> np.ndarray:
            return np.resize(np.broadcast_to(np.asarray(value, dtype), count), batch)

        values = {
            field.name: spread(getattr(params, field.name), np.float32)
            for field in dataclasses.fields(params)
            if field.name not in ("top_k", "seed")
        }
        top_k = np.minimum(np.asarray(params.top_k, np.int64), np.iinfo(np.int32).max)
        own_seed: Any = 0 if params.seed is None else params.seed
        seeds = spread(own_seed, np.uint64)
        words = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1)
        if key is not None and params.seed is None:
            # Two words of any kind of key, which are then one of the kind that is used here.
            words = np.resize(np.asarray(jax.random.bits(key, (2,), "uint32")), (batch, 2))
        own = np.ndim(own_seed) == 1
        stream = np.zeros(batch, np.int32) if own else np.arange(batch, dtype=np.int32)
        return cls(
            top_k=spread(top_k, np.int32), key=words.astype(np.uint32), stream=stream, **values
        )


def choose(
    logits: Float[Array, "batch vocab"], params: RowParams, step: Array, *, sampled: bool
) -> Int[Array, " batch"]:
    """The next token of each row: the most likely one, or one drawn where it is not greedy.

    `step` counts the tokens before it, of all rows or of each.
    """
    best = first_of_largest(logits)
    if not sampled:
        return best
    hot = params.temperature > 0
    scores = logits.astype(jnp.float32) / jnp.where(hot, params.temperature, 1.0)[:, None]
    scores = truncate(scores, params.top_k, params.top_p, params.min_p)
    steps = jnp.broadcast_to(step, params.stream.shape)
    keys = jax.vmap(_row_key)(params.key, params.stream, steps)
    return jnp.where(hot, draw(keys, scores), best)


def _row_key(words: Array, stream: Array, step: Array) -> Key:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stream), step)


def first_of_largest(x: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """argmax, which XLA does four times slower on a CPU than these two reductions."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    at = jnp.where(x == largest, jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1] - 1)
    return jnp.min(at, axis=-1)


def penalize(
    logits: Float[Array, "batch vocab"],
    in_prompt: Bool[Array, "batch vocab"],
    counts: Int[Array, "batch vocab"],
    params: RowParams,
) -> Float[Array, "batch vocab"]:
    """Logits lowered for tokens of the prompt and of the text so far, of which `counts` tells."""
    logits = logits.astype(jnp.float32)
    repetition = params.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | (counts > 0), repeated, logits)
    frequency = params.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return logits - frequency - params.presence_penalty[:, None] * (counts > 0)


def truncate(
    scores: Float[Array, "batch vocab"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
    min_p: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """Scores, -inf where top-k, then top-p, then min-p cut them off; the first always stays.

    Tokens of one score stay or go together.  Nothing is computed that no row asks for.
    """

    def by_rank(scores: Array) -> Array:
        kept = _reaching(scores, jnp.ones_like(scores, jnp.int32), top_k)
        return jnp.where(kept | (top_k == 0)[:, None], scores, -jnp.inf)

    def by_mass(scores: Array) -> Array:
        weights = _relative(scores)
        # A product that underflows would be reached by no token at all.
        mass = jnp.maximum(top_p * jnp.sum(weights, axis=-1), jnp.finfo(weights.dtype).tiny)
        kept = _reaching(scores, weights, mass)
        return jnp.where(kept | (top_p >= 1)[:, None], scores, -jnp.inf)

    scores = jax.lax.cond(jnp.any(top_k > 0), by_rank, lambda x: x, scores)
    scores = jax.lax.cond(jnp.any(top_p < 1), by_mass, lambda x: x, scores)
    return jnp.where(_relative(scores) >= min_p[:, None], scores, -jnp.inf)


def _relative(scores: Array) -> Array:
    """Probabilities over the largest one's."""
    return jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))


def _reaching(
    scores: Float[Array, "batch vocab"], weights: Array, target: Array
) -> Bool[Array, "batch vocab"]:
    """The fewest highest scores whose weights together reach each row's target.

    The lowest of them is found bit by bit: 32 sums take a fiftieth of the time of sorting.
    """
    # The bits of a float are in the order of the numbers, once those of negative ones are flipped.
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)  # one zero, and not two
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def with_bit(i: Array, lowest: Array) -> Array:
        # From the smallest int32 upward; the highest bit wraps to 0.
        higher = lowest + jnp.left_shift(jnp.int32(1), 31 - i)
        reached = jnp.sum(jnp.where(ordered >= higher[:, None], weights, 0), axis=-1) >= target
        return jnp.where(reached, higher, lowest)

    smallest = jnp.full(len(scores), jnp.iinfo(jnp.int32).min, jnp.int32)
    return ordered >= jax.lax.fori_loop(0, 32, with_bit, smallest)[:, None]


def draw(keys: Key, scores: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """A token of each row by softmax(scores): a block of tokens first, then one within it.

    Two random numbers a row, where Gumbel's way takes one for each token of the vocabulary.
    """
    batch, vocab = scores.shape
    weights = jnp.pad(_relative(scores), ((0, 0), (0, -vocab % _BLOCK)))
    blocks = weights.reshape(batch, -1, _BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _where_reached(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _where_reached(within, uniform[:, 1])


def _where_reached(weights: Float[Array, "batch n"], share: Float[Array, " batch"]) -> Array:
    """Where the running sum exceeds a share of the whole; never at a weight of 0."""
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    wanted = share * jnp.max(sums, axis=-1)
    return jnp.argmax(sums > wanted[:, None], axis=-1).astype(jnp.int32)
