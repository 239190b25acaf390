"""An embedding that the output head shares, and what PEFT's `ensure_weight_tying` makes of it.

Only of the decoder's own tree is it known that the head is either there or shared.  An adapter on
its shared table carries a mark, which is never trained and whose presence alone counts:
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

TABLE = "model/embed_tokens/embedding"
HEAD = "lm_head"
OUTPUT_HEADS = (HEAD,)
"""Left out of "all-linear", as PEFT leaves out the output layer."""
TIED, UNTIED = f"{TABLE}_lora_tied", f"{TABLE}_lora_untied"
_TABLE_NAME = "model.embed_tokens"
_WAY_OUT = (
    "set ensure_weight_tying: true to train both as one, or give the base as a checkpoint with"
    " tie_word_embeddings false and an lm_head.weight"
)


def shares_head(params: Params) -> bool:
    """Whether the output head of these parameters is their embedding.

    Example:
        >>> shares_head({"model": {"embed_tokens": {"embedding": 1}}})
        True
    """
    paths = {path for path, _ in leaves_with_path(params)}
    return TABLE in paths and not any(path.split("/")[0] == HEAD for path in paths)


def is_tied(adapter: Params) -> bool:
    """Whether an adapter acts on an embedding and, as one, on the head that shares it."""
    return any(path == TIED for path, _ in leaves_with_path(adapter))


def head_mark(base_params: Params, config: LoraConfig, adapted: Collection[str]) -> dict[str, Any]:
    """The mark of an adapter with these leaves; nothing where no shared embedding is adapted.

    Raises:
        InputError: for what the two uses of one table cannot have in common.
    """
    low_rank = f"{TABLE}_lora_A" in adapted
    if not shares_head(base_params) or not (low_rank or TABLE in adapted):
        return {}
    if not config.ensure_weight_tying:
        if TABLE in adapted:
            raise InputError(
                f"lora: modules_to_save: this base has no {HEAD}, so its output head shares"
                f" {TABLE}, and PEFT would train a copy beside it; {_WAY_OUT}"
            )
        if config.moves_base:
            raise InputError(
                f"lora: init_lora_weights={config.init_lora_weights!r} would move {TABLE} under"
                f" the output head that shares it; {_WAY_OUT}"
            )
        return {UNTIED: jnp.ones((), jnp.float32)}
    if low_rank and config.use_dora:
        raise InputError(
            f"lora: use_dora with ensure_weight_tying: the magnitudes of {TABLE} and of the head"
            " that shares it belong to different axes, and PEFT trains two models of them; leave"
            " one of the two options out"
        )
    own, heads = (config.scaling(name) for name in (TABLE.rpartition("/")[0], HEAD))
    if low_rank and own != heads:
        raise InputError(
            f"lora: rank_pattern and alpha_pattern give {TABLE} the scaling {own:g} and {HEAD},"
            f" which shares it under ensure_weight_tying, {heads:g}; give both the same"
        )
    return {TIED: jnp.ones((), jnp.float32)}


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
    if not (shares_head(tree) or is_tied(tree)):
        return config
    names = {name: getattr(config, name) for name in ("target_modules", "modules_to_save")}
    if config.ensure_weight_tying:
        return dataclasses.replace(config, **{k: _renamed(v) for k, v in names.items()})
    for field, given in names.items():
        if isinstance(given, list) and HEAD in given:
            raise InputError(
                f"lora: {field} names {HEAD}, but the output head of this base is its embedding;"
                f" {_WAY_OUT}"
            )
    return config


def untied_head(merged: Params, base_params: Params, dtype: Any) -> Params:
    """A merged tree with the head that its base shared, as a kernel of its own."""
    table = dict(leaves_with_path(base_params))[TABLE]
    dense = jnp.asarray(meta.unbox(table))
    return combine(merged, {HEAD: {"kernel": dense.T.astype(dtype or dense.dtype)}})


def _renamed(names: list[str] | str | None) -> list[str] | str | None:
    if isinstance(names, list):
        return list(dict.fromkeys(_TABLE_NAME if name == HEAD else name for name in names))
    if isinstance(names, str) and names != "all-linear" and re.fullmatch(names, HEAD):
        return rf"(?:{names}|{re.escape(_TABLE_NAME)})"
    return names
