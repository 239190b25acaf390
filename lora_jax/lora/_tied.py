"""An embedding that the output head shares, and what PEFT's `ensure_weight_tying` makes of it.

Only of the decoder's own trees is it known that the head is either there or shared.  An adapter on
a shared table carries a mark, which is never trained and whose presence alone counts:
`embedding_lora_untied` where it acts on the look-up only, as PEFT's does by default, and
`embedding_lora_tied` where it acts on the head too.  An adapter without a mark acts wherever the
table is read.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from .._config import LoraConfig
from .._errors import InputError
from .._tree import combine, leaves_with_path
from .._typing import Params


@dataclasses.dataclass(frozen=True)
class SharedTable:
    """An embedding by the path of its table, and the head that may share it."""

    table: str
    head: str

    @property
    def module(self) -> str:
        """The embedding's dotted name."""
        return self.table.rpartition("/")[0].replace("/", ".")


DECODERS = (
    SharedTable("model/embed_tokens/embedding", "lm_head"),
    SharedTable("transformer/wte/embedding", "lm_head"),
    SharedTable("gpt_neox/embed_in/embedding", "embed_out"),
)
"""The embedding and the head of every family of decoders."""
OUTPUT_HEADS = tuple({known.head for known in DECODERS})
"""Left out of "all-linear", as PEFT leaves out the output layer."""
_TIED, _UNTIED = "_lora_tied", "_lora_untied"
_WAY_OUT = (
    "set ensure_weight_tying: true to train both as one, or give the base as a checkpoint with"
    " tie_word_embeddings false and an lm_head.weight"
)


def shared_table(params: Params) -> SharedTable | None:
    """The embedding that is the output head of these parameters too; None without such.

    Example:
        >>> shared_table({"model": {"embed_tokens": {"embedding": 1}}}).head
        'lm_head'
    """
    own, paths = embedding_of(params), {path for path, _ in leaves_with_path(params)}
    if own is None or any(path.split("/")[0] == own.head for path in paths):
        return None
    return own


def embedding_of(params: Params) -> SharedTable | None:
    """The embedding of a decoder, whether it is shared or not; None of any other tree."""
    paths = {path for path, _ in leaves_with_path(params)}
    return next((known for known in DECODERS if known.table in paths), None)


def tied_table(adapter: Params) -> SharedTable | None:
    """The embedding on which an adapter acts, as one with the head that shares it."""
    return _marked(adapter, _TIED)


def untied_table(adapter: Params) -> SharedTable | None:
    """The embedding on whose look-up alone an adapter acts, while the head shares it."""
    return _marked(adapter, _UNTIED)


def _marked(adapter: Params, end: str) -> SharedTable | None:
    paths = {path for path, _ in leaves_with_path(adapter)}
    return next((known for known in DECODERS if known.table + end in paths), None)


def mark_names(path: str) -> tuple[str, str]:
    """The marks beside an embedding: of an adapter that acts on the head too, and not.

    Example:
        >>> mark_names("wte/embedding")
        ('wte/embedding_lora_tied', 'wte/embedding_lora_untied')
    """
    return path + _TIED, path + _UNTIED


def head_mark(base_params: Params, config: LoraConfig, adapted: Collection[str]) -> dict[str, Any]:
    """The mark of an adapter with these leaves; nothing where no shared embedding is adapted.

    Raises:
        InputError: for what the two uses of one table cannot have in common.
    """
    shared = shared_table(base_params)
    if shared is None:
        return {}
    table, head = shared.table, shared.head
    low_rank = f"{table}_lora_A" in adapted
    if not (low_rank or table in adapted):
        return {}
    tied, untied = mark_names(table)
    if not config.ensure_weight_tying:
        if table in adapted:
            raise InputError(
                f"lora: modules_to_save: this base has no {head}, so its output head shares"
                f" {table}, and PEFT would train a copy beside it; {_WAY_OUT}"
            )
        if config.moves_base:
            raise InputError(
                f"lora: init_lora_weights={config.init_lora_weights!r} would move {table} under"
                f" the output head that shares it; {_WAY_OUT}"
            )
        return {untied: jnp.ones((), jnp.float32)}
    if low_rank and config.use_dora:
        raise InputError(
            f"lora: use_dora with ensure_weight_tying: the magnitudes of {table} and of the head"
            " that shares it belong to different axes, and PEFT trains two models of them; leave"
            " one of the two options out"
        )
    own, heads = (config.scaling(name) for name in (table.rpartition("/")[0], head))
    if low_rank and own != heads:
        raise InputError(
            f"lora: rank_pattern and alpha_pattern give {table} the scaling {own:g} and {head},"
            f" which shares it under ensure_weight_tying, {heads:g}; give both the same"
        )
    return {tied: jnp.ones((), jnp.float32)}


def tied_config(tree: Params, config: LoraConfig) -> LoraConfig:
    """The config with the embedding in the place of the head that shares it, as PEFT saves it.

    Args:
        tree: A base, or an adapter.
        config: With `ensure_weight_tying`; else it is returned as it is.

    Raises:
        InputError: if it names a head that only `ensure_weight_tying` would find.

    Example:
        >>> tree = {"model": {"embed_tokens": {"embedding": 1}}}
        >>> config = LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
        >>> tied_config(tree, config).target_modules
        ['model.embed_tokens']
    """
    shared = shared_table(tree) or tied_table(tree)
    if shared is None:
        return config
    names = {name: getattr(config, name) for name in ("target_modules", "modules_to_save")}
    if config.ensure_weight_tying:
        return dataclasses.replace(config, **{k: _renamed(v, shared) for k, v in names.items()})
    for field, given in names.items():
        if isinstance(given, list) and shared.head in given:
            raise InputError(
                f"lora: {field} names {shared.head}, but the output head of this base is its"
                f" embedding; {_WAY_OUT}"
            )
    return config


def untied_head(merged: Params, base_params: Params, dtype: Any) -> Params:
    """A merged tree with the head that its base shared, as a kernel of its own."""
    own = embedding_of(base_params)
    assert own is not None
    table = dict(leaves_with_path(base_params))[own.table]
    dense = jnp.asarray(meta.unbox(table))
    return combine(merged, {own.head: {"kernel": dense.T.astype(dtype or dense.dtype)}})


def _renamed(names: list[str] | str | None, shared: SharedTable) -> list[str] | str | None:
    module, head = shared.module, shared.head
    if isinstance(names, list):
        return list(dict.fromkeys(module if name == head else name for name in names))
    if isinstance(names, str) and names != "all-linear" and re.fullmatch(names, head):
        return rf"(?:{names}|{re.escape(module)})"
    return names
