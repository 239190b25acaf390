"""A model and its tokenizer with more tokens than they came with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import InputError
from .._tree import leaves_with_path, map_with_path
from .._typing import Array, Params
from ..quant import QuantizedTensor
from ._load import Pretrained

_TABLES = ("embed_tokens/embedding", "wte/embedding", "embed_in/embedding")
_HEADS = ("lm_head/kernel", "lm_head/bias", "embed_out/kernel")


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

    def grow(path: str, leaf: Any) -> Any:
        axis = _vocabulary_axis(path)
        if axis is None:
            return leaf
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


def vocabulary_tables(params: Params) -> list[str]:
    """Paths of the embedding of tokens, and of a head that does not share it.

    Example:
        >>> vocabulary_tables({"model": {"embed_tokens": {"embedding": 1}, "norm": {"scale": 1}}})
        ['model/embed_tokens/embedding']
    """
    paths = [path for path, _ in leaves_with_path(params)]
    return [p for p in paths if _vocabulary_axis(p) is not None and not p.endswith("bias")]


def _vocabulary_axis(path: str) -> int | None:
    if path.endswith(_TABLES):
        return 0
    return (1 if path.endswith("kernel") else 0) if path.endswith(_HEADS) else None


def _grown(table: Array, axis: int, known: int, size: int) -> Array:
    """The table with `size` rows, of which those from `known` on are the mean of the others."""
    rows = jnp.moveaxis(jnp.asarray(table), axis, 0)[:known]
    mean = jnp.mean(rows.astype(jnp.float32), axis=0, keepdims=True).astype(rows.dtype)
    new = jnp.broadcast_to(mean, (size - known, *rows.shape[1:]))
    return jnp.moveaxis(jnp.concatenate([rows, new]), 0, axis)
