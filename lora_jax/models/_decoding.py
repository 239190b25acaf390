"""Tokens from a model: a compiled prefill, then chunks of tokens over a key-value cache.

Lengths and batches are rounded up so that similar calls share their programs; whatever else a
call asks for is an array.  Python looks at the tokens between chunks and not after each of them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from .._errors import InputError
from .._typing import Array, Key, Params
from ..lora import pad_rows
from ..quant import QuantizedTensor
from ._cache import KVCache, by_layer, dtype_name, init_cache
from ._decoder import CausalLM
from ._sampling import RowParams, SamplingParams, choose, penalize
from ._unstack import unstacked

CHUNK = 32
"""Tokens that are added at most before Python looks at them."""
MOST_LOGPROBS = 20
"""Alternatives of which log-probabilities can be told, as in OpenAI's API."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What makes programs differ: all else about a call is data."""

    sampled: bool
    penalized: bool
    logprobs: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What the rows of a batch ask for; a row that only fills it up may add no token.

    `lengths`: tokens of the prompts.  `limits`: tokens to add.  `end_ids`: tokens that end a
    text, -1 for none.  `in_prompt`: which tokens a prompt has, where there are penalties.
    """

    params: RowParams
    lengths: Int[Array | np.ndarray, " batch"]
    limits: Int[Array | np.ndarray, " batch"]
    end_ids: Int[Array | np.ndarray, " ends"]
    in_prompt: Bool[Any, "batch vocab"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the rows are: the last token, how many there are, which rows have ended.

    `counts`: how often each token is in the text so far, where there are penalties.
    """

    token: Int[Array, " batch"]
    step: Int[Array, ""]
    ended: Bool[Array | np.ndarray, " batch"]
    counts: Int[Array, "batch vocab"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens, and where asked for their log-probabilities and those of the likeliest ones.

    These are of the model's own distribution: before penalties, temperature and truncation.
    """

    token: Any
    logprob: Any = None
    top_token: Any = None
    top_logprob: Any = None


class Decoding:
    """A batch of prompts whose texts grow chunk by chunk.

    Args:
        module: A `CausalLM`, or one wrapped by `lora_linen`.
        params: Its parameters.
        prompts: Token ids, at least one prompt and at least one id in each.
        sampling: How tokens are chosen.
        max_new_tokens: Tokens to add at most, to all rows or one number for each.
        key: Random key, instead of a seed.
        end_ids: Tokens that end a text.
        pad_id: Token that fills up short prompts; it is never seen by others.
        logprobs: Whether to compute log-probabilities.
        cache_dtype: One of `CACHE_DTYPES`; that of the activations by default.

    Raises:
        InputError: if a prompt is empty or too long, or an argument is out of its range.
    """

    def __init__(
        self,
        module: Any,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        max_new_tokens: int | Sequence[int],
        key: Key | None = None,
        end_ids: Iterable[int] = (),
        pad_id: int = 0,
        logprobs: bool = False,
        cache_dtype: str | None = None,
    ) -> None:
        config = _model(module).config
        limits = _limits(max_new_tokens, len(prompts))
        _check(config, prompts, limits, sampling, key)
        self.limits: list[int] = limits.tolist()
        length, batch = bucket(max(map(len, prompts)), 16, 2), bucket(len(prompts), 1, 1)
        ids, segments = _left_padded(prompts, batch, length, pad_id)
        kind = Kind(sampling.samples, sampling.penalizes, logprobs)
        self._request = Request(
            RowParams.of(sampling, len(prompts), batch, key),
            lengths=segments.sum(axis=1, dtype=np.int32),
            limits=np.pad(limits, (0, batch - len(prompts))),
            end_ids=_end_ids(end_ids),
            in_prompt=_in_prompt(prompts, batch, config.vocab_size) if kind.penalized else None,
        )
        self._module, self._kind = module, kind
        self._params = pad_rows(params, batch)
        self._stepper = unstacked(module, self._params)
        self._cache_dtype = dtype_name(cache_dtype or _model(module).dtype)
        self._count, self._most, self._done = len(prompts), int(limits.max()), 0
        self._inputs: Any = (ids, segments, bucket(length + self._most, 64, 4))
        self._progress: Any = None
        self._cache: Any = None

    @property
    def running(self) -> bool:
        """Whether any row may still get tokens."""
        return self._done == 0 or not np.all(self._progress.ended)

    def more(self, count: int) -> Chosen:
        """Up to `count` and `CHUNK` more tokens for each row, at least one; one at the first call.

        Returns:
            Arrays of (prompts, tokens); what a row has after its end means nothing.
        """
        if self._done == 0:
            chosen, done = self._begin(), 1
        else:
            count = max(1, min(count, CHUNK, self._most - self._done))
            program = _decode_program(_sliced_by_copies(self._params))
            self._cache, self._progress, chosen, done = program(
                *self._stepper, self._cache, self._progress, self._request, np.int32(count),
                kind=self._kind,
            )  # fmt: skip
        chosen, done, ended = jax.device_get((chosen, done, self._progress.ended))
        self._progress = dataclasses.replace(self._progress, ended=ended)
        self._done += int(done)
        return jax.tree.map(lambda x: x[: self._count, :done], chosen)

    def end(self, row: int) -> None:
        """Let a row have no more tokens."""
        ended = np.array(self._progress.ended)
        ended[row] = True
        self._progress = dataclasses.replace(self._progress, ended=ended)

    def _begin(self) -> Chosen:
        """The first token, which takes the prompt and no step."""
        ids, segments, capacity = self._inputs
        logits, self._cache = _prefill(
            self._module, self._params, ids, segments, capacity=capacity,
            dtype=self._cache_dtype, split=_model(self._stepper[0]).unrolled,
        )  # fmt: skip
        self._progress, chosen = _first(logits, self._request, kind=self._kind)
        return jax.tree.map(lambda x: x[:, None], jax.device_get(chosen))


def _model(module: Any) -> CausalLM:
    """The model itself, which a wrapper keeps in its `module`."""
    return getattr(module, "module", module)


def bucket(n: int, least: int, steps: int) -> int:
    """The next of the sizes that cut the way from each power of two to the next in `steps`.

    Example:
        >>> [bucket(n, 16, 2) for n in (5, 17, 33, 50, 130)]
        [16, 24, 48, 64, 192]
    """
    step = max((1 << (n - 1).bit_length()) // (2 * steps), 1)
    return max(least, -(-n // step) * step)


def _limits(max_new_tokens: int | Sequence[int], count: int) -> np.ndarray:
    limits = np.asarray(max_new_tokens, np.int32)
    if np.any(limits < 1):
        raise InputError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if limits.shape not in ((), (count,)):
        raise InputError(f"generate: max_new_tokens has {len(limits)} values for {count} prompts")
    return np.resize(limits, count)


def _check(config, prompts, limits, sampling: SamplingParams, key: Key | None) -> None:
    if sampling.samples and key is None and sampling.seed is None:
        raise InputError("generate: sampling needs a key or a seed; give seed=0, say")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise InputError(f"generate: prompt {i} is empty; start it with the bos token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"generate: prompt {i} holds a token outside of 0..{config.vocab_size - 1};"
                " is this the model's own tokenizer?"
            )
        if len(prompt) + limit > config.context_length:
            raise InputError(
                f"generate: prompt {i} has {len(prompt)} tokens, which with {limit} new ones"
                f" exceeds the model's {config.context_length} positions; shorten the"
                " prompt or lower max_new_tokens"
            )


def _left_padded(
    prompts: Sequence[Sequence[int]], batch: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segment ids (1 token, 0 padding); rows beyond the prompts are all padding."""
    ids = np.full((batch, length), pad_id, np.int32)
    segments = np.zeros((batch, length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return ids, segments


def _end_ids(end_ids: Iterable[int]) -> np.ndarray:
    """Filled up, so that another number of them is seldom another program."""
    ids = np.asarray(sorted(set(end_ids)), np.int32)
    return np.pad(ids, (0, bucket(max(len(ids), 1), 8, 1) - len(ids)), constant_values=-1)


def _in_prompt(prompts: Sequence[Sequence[int]], batch: int, vocab: int) -> np.ndarray:
    seen = np.zeros((batch, vocab), bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


@functools.partial(jax.jit, static_argnames=("module", "capacity", "dtype", "split"))
def _prefill(
    module: Any,
    params: Any,
    ids: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    capacity: int,
    dtype: str,
    split: bool,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after the prompts, and a cache of `capacity` slots that holds them.

    `split` gives each layer an array of its own.
    """
    model = _model(module)
    cache = init_cache(model.config, len(ids), capacity, dtype)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden, cache = module.apply(
        {"params": params}, ids, positions, segments, cache, method="hidden_states"
    )
    logits = module.apply({"params": params}, hidden[:, -1], method="logits")
    return logits, by_layer(cache) if split else cache


@functools.partial(jax.jit, static_argnames="kind")
def _first(
    logits: Float[Array, "batch vocab"], request: Request, *, kind: Kind
) -> tuple[Progress, Chosen]:
    """The first token of each row."""
    batch = len(logits)
    counts = jnp.zeros(logits.shape, jnp.int32) if kind.penalized else None
    begun = Progress(jnp.zeros(batch, jnp.int32), jnp.int32(0), request.limits < 1, counts)
    return _choose(logits, begun, request, kind)


def _choose(
    logits: Float[Array, "batch vocab"], progress: Progress, request: Request, kind: Kind
) -> tuple[Progress, Chosen]:
    """One more token for each row, which counts where the row has not ended."""
    scores, counts = logits, progress.counts
    if kind.penalized:
        assert request.in_prompt is not None and counts is not None
        scores = penalize(logits, request.in_prompt, counts, request.params)
    token = choose(scores, request.params, progress.step, sampled=kind.sampled)
    if counts is not None:
        counts = counts.at[jnp.arange(len(token)), token].add(1)
    step = progress.step + 1
    ends = jnp.any(token[:, None] == request.end_ids, axis=1) | (step >= request.limits)
    chosen = with_logprobs(token, logits) if kind.logprobs else Chosen(token)
    return Progress(token, step, progress.ended | ends, counts), chosen


def with_logprobs(token: Array, logits: Array) -> Chosen:
    """Tokens with their log-probabilities and those of the likeliest in their place."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    best, tokens = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
    return Chosen(token, own, tokens, best)


def _sliced_by_copies(params: Params) -> bool:
    """Whether a GPU would copy each layer's weights out of their stack for every token."""
    kernels = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    return jax.default_backend() == "gpu" and not any(
        isinstance(kernel, QuantizedTensor) for kernel in kernels
    )


@functools.cache
def _decode_program(no_triton: bool) -> Any:
    """`_decode`, compiled with or without XLA's own matrix products on GPUs.

    They want a layer's kernel in an array of its own, where cuBLAS reads it in its stack: 82 and
    168 tokens per second of an 8B model on an H200 (experiments/bench).  Neither reads four bits.
    """
    options = {"xla_gpu_enable_triton_gemm": False} if no_triton else None
    return jax.jit(
        _decode,
        static_argnames=("module", "kind"),
        donate_argnames="cache",
        compiler_options=options,
    )


def _decode(
    module: Any,
    params: Any,
    cache: KVCache,
    progress: Progress,
    request: Request,
    count: Any,
    *,
    kind: Kind,
) -> tuple[KVCache, Progress, Chosen, Array]:
    """Up to `count` more tokens, fewer when every row has ended; how many in the end."""

    batch = len(progress.token)

    def unfinished(state: tuple[Any, ...]) -> Any:
        done, _, progress, _ = state
        return (done < count) & ~jnp.all(progress.ended)

    def add_token(state: tuple[Any, ...]) -> tuple[Any, ...]:
        done, cache, progress, chunk = state
        hidden, cache = module.apply(
            {"params": params},
            progress.token[:, None],
            (request.lengths + progress.step - 1)[:, None],
            jnp.ones((batch, 1), jnp.int32),
            cache,
            method="hidden_states",
        )
        logits = module.apply({"params": params}, hidden[:, 0], method="logits")
        progress, chosen = _choose(logits, progress, request, kind)
        chunk = jax.tree.map(lambda all, new: all.at[:, done].set(new), chunk, chosen)
        return done + 1, cache, progress, chunk

    chunk = empty_chunk(batch, _model(module).config.vocab_size, CHUNK, kind.logprobs)
    state = (jnp.int32(0), cache, progress, chunk)
    done, cache, progress, chunk = jax.lax.while_loop(unfinished, add_token, state)
    # The cache is returned so that it can be updated in place.
    return cache, progress, chunk, done


def empty_chunk(batch: int, vocab: int, length: int, logprobs: bool = True) -> Chosen:
    """Room for the tokens of a chunk."""
    token = jnp.zeros((batch, length), jnp.int32)
    if not logprobs:
        return Chosen(token)
    top = (batch, length, min(MOST_LOGPROBS, vocab))
    return Chosen(token, jnp.zeros(token.shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))
