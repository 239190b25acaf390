"""Token ids in, token ids out."""

from collections.abc import Sequence
from typing import Any

from .._typing import Key, Params
from ._decoding import CHUNK, Decoding
from ._sampling import SamplingParams


def generate(
    module: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    key: Key | None = None,
    seed: int | Sequence[int] | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    cache_dtype: str | None = None,
) -> list[list[int]]:
    """Continue each prompt, greedily or by sampling from softmax(logits / temperature).

    Prompts of different lengths share a batch, padded on the left.  Lengths and batch size
    are rounded up, so that similar calls share one compilation; other values for sampling
    compile nothing.

    Args:
        module: A `CausalLM`, or one wrapped by `lora_linen`.
        params: Its parameters.
        prompts: Token ids, at least one in each prompt.
        max_new_tokens: Tokens to add at most, to all prompts or one number for each.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, seed: See `SamplingParams`.
        key: Random key, which does what a single seed does; one of the two is needed when a
            `temperature` is above 0.
        eos_ids: Tokens that end a text; the one that did is its last token.
        pad_id: Token that fills up short prompts; it is never seen by others.
        cache_dtype: Of the keys and values that are kept: float32, bfloat16, float16, or int8,
            which takes half of bfloat16's memory; that of the activations by default.

    Returns:
        The new tokens of each prompt.

    Raises:
        InputError: if a prompt is empty, an argument is out of its range, or prompt and new
            tokens exceed the model's `max_position_embeddings`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lora_jax.models import CausalLM, ModelConfig
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model = CausalLM(config)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]
        >>> [len(tokens) for tokens in generate(model, params, [[1, 2], [3]], max_new_tokens=5)]
        [5, 5]
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    if not prompts:
        return []
    decoding = Decoding(
        module,
        params,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        key=key,
        end_ids=eos_ids,
        pad_id=pad_id,
        cache_dtype=cache_dtype,
    )
    texts: list[list[int]] = [[] for _ in prompts]
    while decoding.running:
        for text, new in zip(texts, decoding.more(CHUNK).token.tolist(), strict=True):
            text += new
    ends = set(eos_ids)
    limits = decoding.limits
    return [_ended(text[:limit], ends) for text, limit in zip(texts, limits, strict=True)]


def _ended(text: list[int], ends: set[int]) -> list[int]:
    """Tokens up to and with the first that ends the text."""
    end = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    return text[:end]
