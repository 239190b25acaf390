"""A model and its tokenizer with more tokens than they came with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import InputError
from .._tree import leaves_with_path, map_with_path
from .._typing import Array
from ..quant import QuantizedTensor
from ._config import ModelConfig
from ._load import Pretrained


def add_tokens(pretrained: Pretrained, texts: Sequence[str]) -> Pretrained:
    """Give each text a token of its own: w_new = (1/n) Σᵢ wᵢ over the n tokens known so far.

    Rows that a table has beyond its tokens are used first; what is still missing is appended, as
    `resize_token_embeddings(len(tokenizer))` of transformers does it.

    Args:
        pretrained: A model with its tokenizer; `params` may be shapes.
        texts: The new tokens.  Those written like marks (`<|call|>`) are left out of decoded text.

    Returns:
        The model with rows for the tokens in the embedding and in an output head of its own, its
        tokenizer, and `vocab_size` where that had to grow.

    Raises:
        InputError: if a text is a token already or cannot be one, if there is no tokenizer, or if
            a table is quantized.

    Example:
        >>> from lora_jax.models import add_tokens, bundled_model, load_pretrained
        >>> model = load_pretrained(bundled_model())
        >>> grown = add_tokens(model, ["<tool>", "</tool>"])
        >>> ids = grown.tokenizer.encode("<tool></tool>")
        >>> len(ids), max(ids) < grown.config.vocab_size
        (2, True)
    """
    if not texts:
        return pretrained
    if pretrained.tokenizer is None:
        raise InputError(f"{pretrained.directory}: no tokenizer, so no tokens can be added to it")
    tokenizer = pretrained.tokenizer.with_tokens(texts)
    known = pretrained.tokenizer.vocab_size
    size = max(tokenizer.vocab_size, pretrained.config.vocab_size)

    axes = _vocabulary_axes(pretrained.config)

    def grow(path: str, leaf: Any) -> Any:
        if path not in axes:
            return leaf
        axis = axes[path]
        if isinstance(leaf, QuantizedTensor):
            raise InputError(
                f"model.add_tokens: {path} is quantized, so no row can be added; leave"
                " quant.embedding and quant.head out"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda x: _grown(x, axis, known, size), leaf)
        return _grown(leaf, axis, known, size)

    config = dataclasses.replace(pretrained.config, vocab_size=size)
    return dataclasses.replace(
        pretrained,
        module=pretrained.module.clone(config=config),
        params=map_with_path(grow, pretrained.params),
        config=config,
        tokenizer=tokenizer,
    )


def vocabulary_tables(pretrained: Pretrained) -> list[str]:
    """Paths of the embedding of tokens, and of a head that does not share it.

    Example:
        >>> from lora_jax.models import bundled_model, load_without_weights, vocabulary_tables
        >>> vocabulary_tables(load_without_weights(bundled_model()))
        ['model/embed_tokens/embedding']
    """
    axes = _vocabulary_axes(pretrained.config)
    paths = [path for path, _ in leaves_with_path(pretrained.params)]
    return [path for path in paths if path in axes and not path.endswith("bias")]


def _vocabulary_axes(config: ModelConfig) -> dict[str, int]:
    """Which axis of which parameter counts tokens."""
    head = config.family.head
    return {config.family.table: 0, f"{head}/kernel": 1, f"{head}/bias": 0}


def _grown(table: Array, axis: int, known: int, size: int) -> Array:
    """The table with `size` rows, of which those from `known` on are the mean of the others."""
    rows = jnp.moveaxis(jnp.asarray(table), axis, 0)[:known]
    mean = jnp.mean(rows.astype(jnp.float32), axis=0, keepdims=True).astype(rows.dtype)
    new = jnp.broadcast_to(mean, (size - known, *rows.shape[1:]))
    return jnp.moveaxis(jnp.concatenate([rows, new]), 0, axis)
