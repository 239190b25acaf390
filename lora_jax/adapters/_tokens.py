"""Rows of tables in PEFT's files: the file has the rows, and the config which they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from ..lora import OUTPUT_HEADS, is_embedding, is_within, target_name, token_names


def saved_tokens(leaves: Mapping[str, Any], config: LoraConfig) -> dict[str, np.ndarray]:
    """From the path of each module with rows of its own to these rows.

    Args:
        leaves: An adapter's, by path.
        config: The config it was made with.

    Raises:
        InputError: if the two do not name the same rows of the same modules.
    """
    tables = [_table(path) for path in leaves if path.endswith("lora_tokens")]
    wanted, found = _ids_of(tables, config), {}
    for table in tables:
        module, (name, name_ids) = target_name(table), token_names(table)
        rows, ids = np.asarray(leaves[name]), np.asarray(leaves.get(name_ids)).tolist()
        if ids != wanted.get(table):
            raise InputError(
                f"save_adapter: {module} has rows of its own for the tokens {ids}, but by the"
                f" config's trainable_token_indices for {wanted.get(table)}; pass the config the"
                " adapter was made with, and train through optim.freeze_base, which leaves ids"
                " alone"
            )
        found[module] = rows
    return found


def _table(path: str) -> str:
    """The parameter beside which `lora_tokens` lies."""
    prefix = path.removesuffix("lora_tokens")
    return f"{prefix}kernel" if prefix.endswith("/") else prefix.removesuffix("_")


def _ids_of(tables: list[str], config: LoraConfig) -> dict[str, list[int]]:
    """From the path of each table to what the config says of it."""
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        embeddings = [table for table in tables if is_embedding(table)]
        if wanted is not None and len(embeddings) != 1:
            _missing("its list of ids")
        return dict.fromkeys(embeddings, wanted or [])
    ids: dict[str, list[int]] = {}
    for name, own in wanted.items():
        named = [table for table in tables if is_within(target_name(table), name)]
        # The head is left out where it shares the embedding, whose ids are then the same.
        if not named and not (name in OUTPUT_HEADS and own in ids.values()):
            _missing(repr(name))
        ids |= dict.fromkeys(named, own)
    return ids


def _missing(what: str) -> None:
    raise InputError(
        f"save_adapter: trainable_token_indices {what} is not in the adapter; pass the config it"
        " was made with"
    )
