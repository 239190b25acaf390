"""A batch whose rows come and go: each has a place in one cache and is as far as it is.

Each row has as many slots of the cache as the longest text may need, in one array for all rows:
XLA writes to it in place, reads the first slots of all rows without a copy, and knows every shape
beforehand.  Pages would have to be gathered for each token.  What differs between steps is data;
how many rows, tokens and slots take part is rounded up to one of a few shapes, whose programs are
all compiled at the start.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from .._tree import combine
from .._typing import Array, Params
from ..lora import PLAIN, choose_rows
from ._cache import KVCache, by_layer, init_cache
from ._decoding import Chosen, empty_chunk, with_logprobs
from ._sampling import RowParams, SamplingParams, choose, penalize

_STEP = 4
"""How many times larger each shape is than the one before."""
NOWHERE = np.iinfo(np.int32).max
"""A row that is not in the cache: what it writes is dropped."""
MOST_AT_ONCE = 8
"""Tokens of a text that one step adds, at most."""
_LEAST_KEYS = 128
_LEAST_TOKENS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What one step reads: a few tokens for each row that takes part.

    `ids`: tokens, filled up behind.  `rows`: where they are in the cache.  `lengths`: tokens that
    are there already.  `counts`: how many of the `ids` are real.  `adapters`: slots, -1 for the
    plain base.  `ordinals`: how many tokens the text has before the one that is chosen now.
    `chosen`: whether it is; those of a prompt's earlier parts are not.
    """

    ids: Int[Any, "batch seq"]
    rows: Int[Any, " batch"]
    lengths: Int[Any, " batch"]
    counts: Int[Any, " batch"]
    adapters: Int[Any, " batch"]
    ordinals: Int[Any, " batch"]
    chosen: Bool[Any, " batch"]
    params: RowParams
    logprobs: Bool[Any, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the device between steps, and is updated in place.

    `key`, `value`: as in `KVCache`.  `counts`: how often each token is in a row's text.
    `in_prompt`: which tokens its prompt has.  Both are kept for rows with penalties alone.
    """

    key: Any
    value: Any
    counts: Int[Any, "rows vocab"]
    in_prompt: Bool[Any, "rows vocab"]


class ContinuousBatch:
    """Rows that are stepped in any company.

    Args:
        module: A `CausalLM`, wrapped by `lora_linen` where there are adapters, and `laid_out`.
        params: The base's parameters, `laid_out` with it.
        slots: An `AdapterBank`'s slots, `apart`, or an empty tree; only its shapes are looked at.
        rows: How many rows there are.
        length: Tokens of a row at most, prompt and text.
        chunk: Tokens that are read of a prompt in one step, at most.
        cache_dtype: As in `init_cache`.
    """

    def __init__(
        self,
        module: Any,
        params: Params,
        slots: Params,
        *,
        rows: int,
        length: int,
        chunk: int,
        cache_dtype: Any,
    ) -> None:
        self.rows, self.length, self.chunk = rows, length, chunk
        self._module, self._params = module, params
        model = getattr(module, "module", module)
        self.vocab = model.config.vocab_size
        self._fresh = functools.partial(_fresh, model, rows, length, cache_dtype)
        self._batches = sorted({1, *_sizes(1, rows)})
        self._chunks = _sizes(_LEAST_TOKENS, chunk)
        self._lengths = _sizes(_LEAST_KEYS, length)
        self._programs = self._compile(slots)
        self.reset()

    @property
    def compilations(self) -> int:
        """Programs, all of them compiled at the start."""
        return len(self._programs)

    def reset(self) -> None:
        """Forget all rows."""
        self._state = jax.jit(self._fresh)()

    def step(self, slots: Params, step: Step, count: int = 1) -> tuple[Chosen, np.ndarray]:
        """The next tokens of each row, (batch, count), and whether their numbers are finite.

        Args:
            slots: The bank's.
            step: Of a shape from `decode_rows` or `prompt_tokens`.
            count: Tokens to add to texts, up to `MOST_AT_ONCE`; 1 after a prompt.
        """
        batch, seq = step.ids.shape
        keys = _least(self._lengths, min(_reach(step) + count - 1, self.length))
        program = self._programs["step", batch, seq, keys]
        inputs = (self._params, slots, step, np.int32(count))
        self._state, chosen, finite = program(self._state, *inputs)
        if not step.logprobs:
            chosen = Chosen(chosen.token)
        return jax.tree.map(lambda x: x[:, :count], jax.device_get((chosen, finite)))

    def copy(self, source: int, target: int) -> None:
        """Let a row hold what another does."""
        self._state = self._programs["copy"](self._state, np.int32(source), np.int32(target))

    def wipe(self, row: int) -> None:
        """Zero a row: a number that is not finite would reach whoever has it next, times zero."""
        self._state = self._programs["wipe"](self._state, np.int32(row))

    def begin_penalties(self, row: int, prompt: tuple[int, ...]) -> None:
        """Note which tokens a prompt has, and that there is no text yet."""
        seen = np.zeros(self.vocab, bool)
        seen[list(prompt)] = True
        self._state = self._programs["penalties"](self._state, np.int32(row), seen)

    def decode_rows(self, count: int) -> int:
        """The number of rows of the smallest step with room for so many."""
        return _least(self._batches, count)

    def prompt_tokens(self, count: int) -> int:
        """The number of tokens of the smallest step with room for so many of one row."""
        return _least(self._chunks, count)

    def _compile(self, slots: Params) -> dict[Any, Any]:
        state = jax.eval_shape(self._fresh)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        seen = jax.ShapeDtypeStruct((self.vocab,), jnp.bool_)
        programs: dict[Any, Any] = {
            "copy": _in_place(_copied).lower(state, number, number),
            "wipe": _in_place(_wiped).lower(state, number),
            "penalties": _in_place(_with_prompt).lower(state, number, seen),
        }
        for batch, seq in sorted({(n, 1) for n in self._batches} | {(1, n) for n in self._chunks}):
            inputs = (self._params, slots, empty_step(batch, seq), np.int32(1))
            for keys in self._lengths:
                advance = functools.partial(_advance, self._module, self.rows, keys)
                programs["step", batch, seq, keys] = _in_place(advance).lower(state, *inputs)
        return {name: lowered.compile() for name, lowered in programs.items()}


def _in_place(function: Any) -> Any:
    """A state goes in, and comes out in the same memory."""
    return jax.jit(function, donate_argnums=0)


def empty_step(batch: int, seq: int) -> Step:
    """A step in which no row takes part, to be filled in.

    Example:
        >>> empty_step(4, 1).ids.shape
        (4, 1)
    """

    def whole(value: int) -> np.ndarray:
        return np.full(batch, value, np.int32)

    params = RowParams.of(SamplingParams(), batch, batch, None)
    return Step(
        ids=np.zeros((batch, seq), np.int32), rows=whole(NOWHERE), lengths=whole(0),
        counts=whole(0), adapters=whole(PLAIN), ordinals=whole(0), chosen=np.zeros(batch, bool),
        params=params, logprobs=np.bool_(False),
    )  # fmt: skip


def _sizes(least: int, most: int) -> list[int]:
    """From the most downwards by a factor of `_STEP`, but not below the least.

    Example:
        >>> _sizes(1, 16), _sizes(128, 1000), _sizes(128, 64)
        ([1, 4, 16], [250, 1000], [64])
    """
    return [*_sizes(least, most // _STEP), most] if most // _STEP >= least else [most]


def _least(sizes: list[int], count: int) -> int:
    return next(size for size in sizes if size >= count)


def _reach(step: Step) -> int:
    """Slots that some row of a step looks at."""
    return int(np.max(np.where(step.counts > 0, step.lengths + step.counts, 1)))


def _fresh(model: Any, rows: int, length: int, dtype: Any) -> State:
    cache = init_cache(model.config, rows, length, dtype)
    cache = by_layer(cache) if model.unrolled else cache
    shape = (rows, model.config.vocab_size)
    return State(cache.key, cache.value, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def _advance(
    module: Any,
    all_rows: int,
    keys: int,
    state: State,
    params: Any,
    slots: Any,
    step: Step,
    count: Any,
) -> tuple[State, Chosen, Bool[Array, "batch most"]]:
    """`count` more tokens of each row, each after the one before."""
    batch, seq = step.ids.shape
    vocab = getattr(module, "module", module).config.vocab_size

    def add(at: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, ids, chunk, finite = carry
        own = dataclasses.replace(
            step, ids=ids, lengths=step.lengths + at * step.counts, ordinals=step.ordinals + at
        )
        state, logits = _read(module, all_rows, keys, state, params, slots, own)
        state, chosen = _choose(state, logits, own)
        chunk = jax.tree.map(lambda all, new: all.at[:, at].set(new), chunk, chosen)
        finite = finite.at[:, at].set(jnp.all(jnp.isfinite(logits), axis=-1))
        return state, chosen.token[:, None], chunk, finite

    most = MOST_AT_ONCE if seq == 1 else 1
    nothing = (empty_chunk(batch, vocab, most), jnp.ones((batch, most), bool))
    carry = (state, jnp.asarray(step.ids), *nothing)
    if seq == 1:
        state, _, chunk, finite = jax.lax.fori_loop(0, count, add, carry)
    else:
        state, _, chunk, finite = add(0, carry)
    return state, chunk, finite


def _read(
    module: Any, all_rows: int, keys: int, state: State, params: Any, slots: Any, step: Step
) -> tuple[State, Float[Array, "batch vocab"]]:
    """Logits after the tokens of a step, which are in the cache then."""
    batch, seq = step.ids.shape
    overlay = combine(slots, choose_rows(slots, step.adapters))
    variables = {"params": combine(params, overlay)}
    last = jnp.maximum(step.counts - 1, 0)
    # What fills up stands where the last token does: positions tell some models how long texts are.
    positions = step.lengths[:, None] + jnp.minimum(jnp.arange(seq), last[:, None])
    rows = None if batch == all_rows else step.rows
    segments = jnp.ones((batch, keys), jnp.int32)
    cache = KVCache(state.key, state.value, segments, step.lengths, rows)
    hidden, cache = module.apply(
        variables, step.ids, positions, None, cache, method="hidden_states"
    )
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = module.apply(variables, hidden[:, None], method="logits")[:, 0]
    return dataclasses.replace(state, key=cache.key, value=cache.value), logits


def _choose(state: State, logits: Float[Array, "batch vocab"], step: Step) -> tuple[State, Chosen]:
    """A token of each row, which its text has from then on."""
    token = _chosen(logits, state, step)
    counts = state.counts.at[step.rows, token].add(step.chosen.astype(jnp.int32), mode="drop")
    chosen = jax.lax.cond(step.logprobs, with_logprobs, _without_logprobs, token, logits)
    return dataclasses.replace(state, counts=counts), chosen


def _chosen(logits: Array, state: State, step: Step) -> Int[Array, " batch"]:
    """A token of each row; nothing is computed that no row asks for."""
    p = step.params

    def penalized(logits: Array) -> Array:
        return penalize(logits, state.in_prompt[step.rows], state.counts[step.rows], p)

    def pick(scores: Array, *, sampled: bool) -> Array:
        return choose(scores, p, step.ordinals, sampled=sampled)

    penalizes = (p.repetition_penalty != 1) | (p.presence_penalty != 0) | (p.frequency_penalty != 0)
    scores = logits.astype(jnp.float32)
    scores = jax.lax.cond(jnp.any(penalizes), penalized, lambda x: x, scores)
    greedy, drawn = (functools.partial(pick, sampled=sampled) for sampled in (False, True))
    return jax.lax.cond(jnp.any(p.temperature > 0), drawn, greedy, scores)


def _without_logprobs(token: Array, logits: Array) -> Chosen:
    shapes = jax.eval_shape(with_logprobs, token, logits)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return dataclasses.replace(zeros, token=token)


def _row_axis(state: State) -> int:
    return 0 if isinstance(state.key, tuple) else 1


def _copied(state: State, source: Array, target: Array) -> State:
    axis = _row_axis(state)

    def copy(x: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(x, source, axis)
        return jax.lax.dynamic_update_index_in_dim(x, row, target, axis)

    return dataclasses.replace(
        state, key=jax.tree.map(copy, state.key), value=jax.tree.map(copy, state.value)
    )


def _wiped(state: State, row: Array) -> State:
    axis = _row_axis(state)

    def wipe(x: Array) -> Array:
        zeros = jnp.zeros_like(jax.lax.dynamic_index_in_dim(x, row, axis))
        return jax.lax.dynamic_update_index_in_dim(x, zeros, row, axis)

    return dataclasses.replace(
        state, key=jax.tree.map(wipe, state.key), value=jax.tree.map(wipe, state.value)
    )


def _with_prompt(state: State, row: Array, seen: Array) -> State:
    return dataclasses.replace(
        state, counts=state.counts.at[row].set(0), in_prompt=state.in_prompt.at[row].set(seen)
    )
