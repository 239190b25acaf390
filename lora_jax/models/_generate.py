"""Text from a model: one jitted prefill, one jitted loop over a key-value cache."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from .._errors import InputError
from .._typing import Array, Key, Params
from ..lora import pad_rows
from ..quant import QuantizedTensor
from ._decoder import CausalLM, init_cache
from ._layers import KVCache


def generate(
    module: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Key | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> list[list[int]]:
    """Continue each prompt, greedily or by sampling from softmax(logits / temperature).

    Prompts of different lengths share a batch, padded on the left.  Lengths and batch size
    are rounded up to powers of two, so that similar calls share one compilation.

    Args:
        module: A `CausalLM`, or one wrapped by `lora_linen`.
        params: Its parameters.
        prompts: Token ids, at least one in each prompt.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the most likely token each time.
        top_k: Sample among this many most likely tokens; 0 among all.
        top_p: Sample among the most likely tokens that together reach this probability.
        key: Random key, needed when `temperature` is above 0; the same key gives the same
            text.
        eos_ids: Tokens that end a text; the one that did is its last token.
        pad_id: Token that fills up short prompts; it is never seen by others.

    Returns:
        The new tokens of each prompt.

    Raises:
        InputError: if a prompt is empty, an argument is out of its range, or prompt and new
            tokens exceed the model's `max_position_embeddings`.

    Example:
        >>> from lora_jax.models import CausalLM, ModelConfig
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model = CausalLM(config)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]
        >>> [len(tokens) for tokens in generate(model, params, [[1, 2], [3]], max_new_tokens=5)]
        [5, 5]

    Source: top-p is nucleus sampling (Holtzman et al. 2020, section 3.1), after top-k.
    """
    _check(_model(module).config, prompts, max_new_tokens, temperature, top_k, top_p, key)
    if not prompts:
        return []
    length = _bucket(max(map(len, prompts)))
    ids, segments = _left_padded(prompts, _bucket(len(prompts), 1), length, pad_id)
    params = pad_rows(params, len(ids))
    logits, cache = _prefill(module, params, ids, segments, room=_bucket(max_new_tokens))
    tokens, _ = _decode_program(_sliced_by_copies(params))(
        module,
        params,
        cache,
        logits,
        np.arange(len(ids)) >= len(prompts),
        segments.sum(axis=1).astype(np.int32),
        np.asarray(eos_ids, np.int32),
        max_new_tokens,
        None if temperature == 0 else (key, np.float32(temperature), top_k, np.float32(top_p)),
        room=_bucket(max_new_tokens),
    )
    rows = np.asarray(tokens)[: len(prompts), :max_new_tokens].tolist()
    return [_ended(row, set(eos_ids)) for row in rows]


def _model(module: Any) -> CausalLM:
    """The model itself, which a wrapper keeps in its `module`."""
    return getattr(module, "module", module)


def _check(config, prompts, max_new_tokens, temperature, top_k, top_p, key) -> None:
    if max_new_tokens < 1:
        raise InputError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise InputError(
            "generate: temperature and top_k must be at least 0 and top_p in (0, 1], got"
            f" {temperature}, {top_k} and {top_p}"
        )
    if temperature > 0 and key is None:
        raise InputError("generate: sampling needs a key; give key=jax.random.key(0), say")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"generate: prompt {i} is empty; start it with the bos token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"generate: prompt {i} holds a token outside of 0..{config.vocab_size - 1};"
                " is this the model's own tokenizer?"
            )
        if len(prompt) + max_new_tokens > config.context_length:
            raise InputError(
                f"generate: prompt {i} has {len(prompt)} tokens, which with {max_new_tokens} new"
                f" ones exceeds the model's {config.context_length} positions; shorten"
                " the prompt or lower max_new_tokens"
            )


def _bucket(n: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


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


def _ended(row: list[int], eos_ids: set[int]) -> list[int]:
    """Tokens up to and with the first that ends the text."""
    end = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
    return row[:end]


@functools.partial(jax.jit, static_argnames=("module", "room"))
def _prefill(
    module: Any,
    params: Any,
    ids: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    room: int,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after the prompts, and a cache with `room` slots left."""
    batch, length = ids.shape
    model = _model(module)
    cache = init_cache(model.config, batch, length + room, model.dtype)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden, cache = module.apply(
        {"params": params}, ids, positions, segments, cache, method="hidden_states"
    )
    return module.apply({"params": params}, hidden[:, -1], method="logits"), cache


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
        static_argnames=("module", "room"),
        donate_argnames="cache",
        compiler_options=options,
    )


def _decode(
    module: Any,
    params: Any,
    cache: KVCache,
    logits: Float[Array, "batch vocab"],
    ended: Bool[Array, " batch"],
    lengths: Int[Array, " batch"],
    eos_ids: Int[Array, " eos"],
    limit: Any,
    sampling: tuple[Any, ...] | None,
    *,
    room: int,
) -> tuple[Int[Array, "batch room"], KVCache]:
    """Add tokens until every row has ended or `limit` is reached."""
    batch = len(ended)

    def unfinished(state: tuple[Any, ...]) -> Any:
        step, _, _, ended, _ = state
        return (step < limit) & ~jnp.all(ended)

    def add_token(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, logits, cache, ended, tokens = state
        token = _choose(logits, step, sampling)
        tokens = tokens.at[:, step].set(token)
        ended = ended | jnp.any(token[:, None] == eos_ids, axis=1)
        hidden, cache = module.apply(
            {"params": params},
            token[:, None],
            (lengths + step)[:, None],
            jnp.ones((batch, 1), jnp.int32),
            cache,
            method="hidden_states",
        )
        logits = module.apply({"params": params}, hidden[:, 0], method="logits")
        return step + 1, logits, cache, ended, tokens

    tokens = jnp.zeros((batch, room), jnp.int32)
    state = (jnp.int32(0), logits, cache, ended, tokens)
    _, _, cache, _, tokens = jax.lax.while_loop(unfinished, add_token, state)
    # The cache is returned so that it can be updated in place.
    return tokens, cache


def _choose(
    logits: Float[Array, "batch vocab"], step: Array, sampling: tuple[Any, ...] | None
) -> Int[Array, " batch"]:
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key, temperature, top_k, top_p = sampling
    # A key for each row: what a row says does not depend on how many others there are.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(key, step), jnp.arange(len(logits))
    )
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32) / temperature
    ranked = truncate(ranked, top_k, top_p)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def truncate(
    ranked: Float[Array, "batch vocab"], top_k: Any, top_p: Any
) -> Float[Array, "batch vocab"]:
    """Logits in falling order, -inf where top-k or top-p cuts them off; the first always stays."""
    ranks = jnp.arange(ranked.shape[-1])
    ranked = jnp.where((ranks < top_k) | (top_k == 0), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where((before < top_p) | (ranks == 0), ranked, -jnp.inf)
