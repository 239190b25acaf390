"""The rows of a run: read, some set aside, made into examples."""

import dataclasses

from .._errors import InputError
from ..data import Examples, Rows, build_examples, read_rows
from ..models import Pretrained
from ._config import DataSection

DEFAULT_LENGTH = 512


def with_length(section: DataSection, pretrained: Pretrained) -> DataSection:
    """The section with a `max_length` that the model has positions for.

    Raises:
        InputError: if the one given is larger.
    """
    limit = pretrained.config.context_length
    length = min(DEFAULT_LENGTH, limit) if section.max_length is None else section.max_length
    if length > limit:
        raise InputError(
            f"data.max_length: {length} exceeds the {limit} positions of the model"
            " (max_position_embeddings)"
        )
    return dataclasses.replace(section, max_length=length)


def examples_of(rows: Rows, section: DataSection, pretrained: Pretrained) -> Examples:
    """Rows as token ids and masks, by the settings of a data section."""
    if pretrained.tokenizer is None:
        raise InputError(
            f"{pretrained.directory}: no tokenizer; training needs tokenizer.json, tokenizer.model"
            " or vocab.json with merges.txt"
        )
    return build_examples(
        rows,
        pretrained.tokenizer,
        template=section.template,
        train_on=section.train_on,
        max_length=section.max_length,
    )


def training_rows(section: DataSection) -> Rows:
    """The rows of `data.train`, any held-out ones among them."""
    return _read(section, section.train, section.train_rows)


def held_out_rows(section: DataSection) -> Rows:
    """The rows of `data.eval`, or those set aside."""
    if section.eval is not None:
        return _read(section, section.eval, section.eval_rows)
    return _split(section, training_rows(section))[1]


def rows_of(section: DataSection) -> tuple[Rows, Rows]:
    """Rows to train on, and held-out rows."""
    rows = training_rows(section)
    return (rows, held_out_rows(section)) if section.eval is not None else _split(section, rows)


def _split(section: DataSection, rows: Rows) -> tuple[Rows, Rows]:
    """Rows to train on and those set aside, which are every n-th."""
    every = round(1 / section.eval_share)
    aside = rows.rows[every - 1 :: every][: section.eval_rows]
    if not aside:
        raise InputError(
            f"data.eval_share: {section.eval_share} of {len(rows)} rows leaves none to measure"
            " on; give data.eval, or a larger share"
        )
    chosen = {row.index for row in aside}
    kept = tuple(row for row in rows if row.index not in chosen)
    return dataclasses.replace(rows, rows=kept), dataclasses.replace(rows, rows=aside)


def _read(section: DataSection, source: str | list[str], limit: int | None) -> Rows:
    return read_rows(
        source,
        format=section.format,
        columns=section.columns,
        limit=limit,
        bad_rows=section.bad_rows,
    )
