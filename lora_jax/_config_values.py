"""Values of a `LoraConfig` as files hold them: lists and plain numbers, whatever was given."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._errors import InputError

_MOST_TOKENS = 2**24
"""Ids beyond are no whole numbers in float32."""


def plain_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields with tuples, sets and numpy's numbers as lists and plain numbers.

    Raises:
        InputError: for what is no list of names, no pattern, no layer numbers or no token ids.

    Example:
        >>> fields = {"r": np.int64(4), "target_modules": {"v", "q"}, "layers_to_transform": 0}
        >>> plain_values(fields)
        {'r': 4, 'target_modules': ['q', 'v'], 'layers_to_transform': 0}
    """
    return {name: _READ.get(name, _number)(name, value) for name, value in fields.items()}


def hashable(value: Any) -> Any:
    """Lists and mappings as tuples, mappings in their order."""
    if isinstance(value, dict):
        return tuple((key, hashable(own)) for key, own in value.items())
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own, which JSON can hold."""
    is_number = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if is_number else value


def _number(_field: str, value: Any) -> Any:
    return _plain(value)


def _names(field: str, value: Any) -> list[str] | None:
    return None if value is None else _list_of_names(field, value, "")


def _names_or_expression(field: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    return _list_of_names(field, value, " or one regular expression")


def _list_of_names(field: str, value: Any, or_one: str) -> list[str]:
    if not isinstance(value, list | tuple | set) or not all(isinstance(n, str) for n in value):
        raise InputError(f"lora: {field} must be a list of names{or_one}, got {value!r}")
    return sorted(value) if isinstance(value, set) else list(value)


def _pattern(field: str, value: Any) -> dict[str, Any]:
    """Null is PEFT's word for an empty pattern, or an empty section."""
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"lora: {field} must map patterns to numbers, got {value!r}")
    numbers = {pattern: _plain(number) for pattern, number in (value or {}).items()}
    for pattern in numbers:
        if not isinstance(pattern, str):
            raise InputError(f"lora: {field} must map patterns to numbers, got key {pattern!r}")
    return numbers


def _layers(field: str, value: Any) -> list[int] | int | None:
    value = _plain(value)
    several = isinstance(value, list | tuple | set | range | np.ndarray)
    given: Any = value if several else [] if value is None else [value]
    numbers = [_plain(number) for number in given]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"lora: {field} must be layer numbers, got {value!r}")
    in_order = sorted(numbers) if isinstance(value, set) else numbers
    return in_order if several else next(iter(numbers), None)


def _tokens(field: str, value: Any) -> list[int] | dict[str, list[int]] | None:
    """Lists of ids, and None in the place of an empty one."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _token_ids(field, value) or None
    if not all(isinstance(name, str) for name in value):
        raise InputError(f"lora: {field} must map names to ids, got {value!r}")
    named = {name: _token_ids(field, ids) for name, ids in value.items()}
    return {name: own for name, own in named.items() if own} or None


def _token_ids(field: str, given: Any) -> list[int]:
    several = isinstance(given, list | tuple | set | range | np.ndarray)
    ids: list[Any] = [_plain(x) for x in given] if several else []
    if not several or not all(type(x) is int and 0 <= x < _MOST_TOKENS for x in ids):
        raise InputError(
            f"lora: {field} must be a list of token ids, or map module names to such lists, got"
            f" {given!r}"
        )
    if twice := [x for x, count in collections.Counter(ids).items() if count > 1]:
        raise InputError(f"lora: {field} has {twice[0]} twice; name it once")
    return sorted(ids) if isinstance(given, set) else ids


_READ = {
    "target_modules": _names_or_expression,
    "exclude_modules": _names_or_expression,
    "layers_pattern": _names_or_expression,
    "modules_to_save": _names,
    "target_parameters": _names,
    "rank_pattern": _pattern,
    "alpha_pattern": _pattern,
    "loftq_config": _pattern,
    "layers_to_transform": _layers,
    "trainable_token_indices": _tokens,
}
"""How the fields are read that are more than a number."""
