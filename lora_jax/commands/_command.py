"""What a command is, and the parser that they share."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .._errors import InputError, nearest

SECTIONS = ("model", "quant", "lora", "data", "train", "mesh", "output")
"""What `--section.key value` may name; see `configs/` for all keys."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest word, and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            raise InputError(
                f"{self.prog}: unknown {action.metavar or action.dest} {value!r}"
                f"{nearest(str(value), known)}; known: {', '.join(known)}"
            )

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what its help says, what it takes, and what it does.

    `sections` are the keys of a run's config that `--section.key value` may set; `run` gets the
    options and the words that set such keys.
    """

    text: str
    examples: Sequence[str]
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace, list[str]], None]
    sections: Sequence[str] = ()
