"""A script that completes commands, flags, config keys and their values in a shell (shtab)."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._errors import InputError
from ._command import Parser

SHELLS = ("bash", "zsh", "fish")
_DIRECTORIES = ("DIR", "[NAME=]DIR", "MODEL", "RUN")
_FILES = ("FILE", "FILE.jsonl", "CONFIG.yaml")
_PLACES = {"model.path": "DIR", "train.adapter": "DIR", "data.train": "FILE", "data.eval": "FILE"}
"""Config keys that name a place."""


def completion(
    shell: str,
    parser: Parser,
    commands: Mapping[str, Parser],
    sections: Mapping[str, Sequence[str]],
) -> str:
    """The script for a shell, to be evaluated when it starts.

    Args:
        shell: bash, zsh or fish.
        parser: That of the command line; it is added to.
        commands: Those of the commands within it, by name.
        sections: What each command takes of a run's config.

    Raises:
        InputError: if shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise InputError("completion: needs shtab; pip install shtab") from None
    for name, own in commands.items():
        for key, values in config_keys(sections[name]):
            if f"--{key}" not in own.flags():
                own.add_argument(f"--{key}", metavar=_PLACES.get(key, "VALUE"), choices=values)
        for action in own._actions:
            _complete(action, shtab)
    return shtab.complete(parser, shell)


def config_keys(sections: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """The keys of a run's config within sections, `lora.r`, with the values of those of few.

    Example:
        >>> list(config_keys(["train.method", "output"]))
        [('train.method', ('lora', 'full')), ('output', None)]
    """
    from ..train import RunConfig

    for section in sections:
        name, _, key = section.partition(".")
        cls = _parts(typing.get_type_hints(RunConfig)[name])[0]
        if not dataclasses.is_dataclass(cls):
            yield name, None
            continue
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if key in ("", field.name):
                yield f"{name}.{field.name}", _values(hints[field.name])


def _values(hint: Any) -> tuple[str, ...] | None:
    """All values of a type, if it lists them."""
    found: list[str] = []
    for part in _parts(hint):
        if part is bool:
            found += ["true", "false"]
        elif typing.get_origin(part) is typing.Literal:
            found += [str(value) for value in typing.get_args(part)]
        else:
            return None
    return tuple(found)


def _parts(hint: Any) -> tuple[Any, ...]:
    """What a type may be beside `None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(part for part in typing.get_args(hint) if part is not type(None))
    return (hint,)


def _complete(action: argparse.Action, shtab: Any) -> None:
    """Files and directories where an argument stands for one."""
    if action.metavar in _DIRECTORIES:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif action.metavar in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
