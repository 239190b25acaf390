"""What a run does about tokens: rows for new ones, and the ids that end an answer."""

import dataclasses

from .._errors import InputError
from ..adapters import adapter_notes
from ..data import stop_ids
from ..lora import is_within, target_name
from ..models import ModelConfig, Pretrained, vocabulary_tables
from ._config import ModelSection, RunConfig


def with_tokens_of(section: ModelSection, adapter: str | None) -> ModelSection:
    """The section with the tokens that an adapter was trained with, for a base without them."""
    tokens = adapter_notes(adapter).get("add_tokens", []) if adapter else []
    return dataclasses.replace(section, add_tokens=tokens)


def with_new_rows(config: RunConfig, pretrained: Pretrained) -> RunConfig:
    """Rows of added tokens are trained: nothing has ever been learnt for them."""
    tokenizer, lora = pretrained.tokenizer, config.lora
    added = [] if tokenizer is None else [tokenizer.token_id(text) for text in tokenizer.added]
    if not added or config.train.method == "full" or config.train.adapter is not None:
        return config
    whole = lora.modules_to_save or []
    tables = [target_name(path) for path in vocabulary_tables(pretrained)]
    names = [t.rpartition("/")[2] for t in tables if not any(is_within(t, n) for n in whole)]
    wanted = lora.trainable_token_indices
    if wanted is None and names:
        rows = dataclasses.replace(lora, trainable_token_indices=dict.fromkeys(names, added))
        return dataclasses.replace(config, lora=rows)
    given = [wanted] if isinstance(wanted, list) else list((wanted or {}).values())
    if any(not set(added) <= set(ids) for ids in given):
        raise InputError(
            f"lora: trainable_token_indices lacks ids of model.add_tokens {added}; add them, or"
            " leave it out"
        )
    return config


def stopping_config(pretrained: Pretrained, template: str) -> ModelConfig:
    """The model's config with every id that ends an answer laid out by `template`.

    Whoever generates from a saved model by its files alone then stops there too.
    """
    known = pretrained.config.eos_token_ids
    ends = stop_ids(template, pretrained.tokenizer) if pretrained.tokenizer else ()
    more = tuple(i for i in ends if i not in known)
    if not more:
        return pretrained.config
    return dataclasses.replace(pretrained.config, eos_token_id=(*known, *more))
