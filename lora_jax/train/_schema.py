"""YAML and command-line words into frozen dataclasses, strictly."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from .._errors import InputError, first_line, nearest


class _Loader(yaml.SafeLoader):
    """YAML, but `1e-4` is a number and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text holds.

    Args:
        text: The text.
        where: Place for errors, such as a file's name.

    Raises:
        InputError: with the line, if it is not YAML or has a key twice.

    Example:
        >>> read_yaml("{learning_rate: 1e-4}", "here")
        {'learning_rate': 0.0001}
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML: {error.problem}") from None
    except RecursionError:
        raise InputError(f"{where}: not YAML: nested too deeply") from None
    except Exception as error:  # of a tag or a date (2024-02-30) that its value does not fit
        raise InputError(f"{where}: not YAML: {first_line(error)}") from None


def read_dataclass(cls: Any, raw: Any, where: str, section: str = "") -> Any:
    """Build a frozen dataclass from a mapping; every key must be a field, every type right.

    A class with a `from_dict` of its own reads itself.

    Args:
        cls: The dataclass.
        raw: A mapping, as YAML gives it.
        where: Place for errors, such as `quickstart.yaml`.
        section: Dotted name of the mapping within that place.

    Raises:
        InputError: for an unknown key (with the nearest known one) or a wrong type.

    Example:
        >>> from lora_jax import QuantConfig
        >>> read_dataclass(QuantConfig, {"format": "int4"}, "run.yaml", "quant").format
        'int4'
    """
    place = f"{where}: {section}" if section else where
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: must be a section of `key: value` lines, got {raw!r}")
    for key in raw:
        if not isinstance(key, str):
            raise InputError(f"{place}: a key must be a word, got {key!r}")
    if hasattr(cls, "from_dict"):
        return cls.from_dict(raw, place)
    hints = typing.get_type_hints(cls)
    dotted = f"{section}." if section else ""
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise InputError(f"{where}: {dotted}{key}: unknown key{_instead(cls, key)}")
        values[key] = _typed(hints[key], value, where, f"{dotted}{key}")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise InputError(f"{where}: {dotted}{field.name} is missing; it has no default")
    return cls(**values)


def apply_overrides(raw: dict[Any, Any], words: list[str]) -> dict[Any, Any]:
    """Lay `--section.key value` words over a config; values are read as YAML.

    A hyphen in a section's key is an underscore; names below, such as patterns, stay as they are.

    Raises:
        InputError: for a word that is no such pair.

    Example:
        >>> apply_overrides({"train": {"steps": 5}}, ["--train.steps", "7", "--lora.lora-alpha=4"])
        {'train': {'steps': 7}, 'lora': {'lora_alpha': 4}}
    """
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise InputError(f"{word!r}: expected --section.key value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"--{name}: the value is missing; write --{name} VALUE")
            value = words.pop(0)
        section, *below = name.split(".")
        *sections, key = section, *(x.replace("-", "_") for x in below[:1]), *below[1:]
        node = result
        for section in sections:
            node[section] = dict(node[section]) if isinstance(node.get(section), Mapping) else {}
            node = node[section]
        node[key] = read_yaml(value, f"--{name}")
    return result


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what YAML and JSON can hold.

    Example:
        >>> from lora_jax import QuantConfig
        >>> to_plain({"quant": QuantConfig(), "layers": (0, 1)})["layers"]
        [0, 1]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _instead(cls: Any, key: str) -> str:
    """The nearest key, of this section or one below it; else all there are."""
    hints = typing.get_type_hints(cls)
    below = [f"{name}.{f.name}" for name, hint in hints.items() for f in _fields_of(hint)]
    return nearest(key, [*hints, *below]) or f"; known: {', '.join(hints)}"


def _fields_of(hint: Any) -> tuple[Any, ...]:
    choices = typing.get_args(hint) or (hint,)
    return tuple(f for c in choices if dataclasses.is_dataclass(c) for f in dataclasses.fields(c))


def _typed(hint: Any, value: Any, where: str, key: str) -> Any:
    """The value as the annotated type, or an error that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(args, value, where, key)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, where, key)
    if origin is typing.Literal:
        if value in args:
            return value
        near = nearest(str(value), args)
        raise InputError(f"{where}: {key}: got {value!r}{near}; use {', '.join(args)}")
    if origin is list and isinstance(value, list):
        return [_typed(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): _typed(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    # Not isinstance: true and false are integers to Python.
    if type(value) is hint:
        return value
    raise InputError(f"{where}: {key}: expected {_name(hint)}, got {value!r}")


def _typed_union(choices: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _typed(choice, value, where, key)
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    expected = " or ".join(_name(choice) for choice in choices)
    raise InputError(f"{where}: {key}: expected {expected}, got {value!r}")


def _name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if hint in names or hint is type(None):
        return names.get(hint, "null")
    (item, *_), origin = typing.get_args(hint) or (Any,), typing.get_origin(hint)
    return f"a list of {_name(item).removeprefix('a ')}s" if origin is list else "a mapping"
