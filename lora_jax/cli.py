"""The command line: parse, call, print."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ._errors import InputError, nearest
from ._interrupt import stops_at_once
from .commands import COMMANDS, SECTIONS, Parser, home, parsers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; wrong input gives one line on stderr and exit code 2."""
    try:
        try:
            _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            if sys.stdout is not None:  # which may be closed
                sys.stdout.flush()
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read has read enough.  Python would try to write the rest as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _fail(message: str, code: int) -> NoReturn:
    """End with a line on stderr, which begins in red on a terminal."""
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error:", "bold red"), f" {message}")
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)
    sys.exit(code)


def _run(arguments: list[str]) -> None:
    if not arguments:
        print("\n".join(home(Path(), list(COMMANDS))))
        return
    parser, commands = parsers()
    keys, others = _config_keys(arguments)
    options, rest = parser.parse_known_args(others)
    command, words = COMMANDS[options.name], [*rest, *keys]
    keys = _overrides(commands[options.name], words, command.sections)
    if command.stopped is None:
        command.run(options, keys)
        return
    with stops_at_once(command.stopped, after_sigterm=143):
        command.run(options, keys)


def _config_keys(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--section.key value` words, wherever they stand, and all others."""
    keys, others = [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--resume" and words[:1] not in (["auto"], ["always"]):
            word = "--resume=always"  # argparse would take the config that follows for its value
        if not re.match(r"--\w+\.\w", word):
            others.append(word)
            continue
        keys.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            keys.append(words.pop(0))
    return keys, others


def _overrides(command: Parser, rest: list[str], sections: Sequence[str]) -> list[str]:
    """The words that set config keys; anything else is a mistake to name."""
    for word in rest:
        section = word[2:].split(".")[0].split("=")[0]
        taken = section in sections or word[2:].split("=")[0] in sections
        if word.startswith("--") and section in SECTIONS and not taken:
            names = [f"--{s}" if "." in s else f"--{s}.key" for s in sections]
            there = f"only {', '.join(names)}" if names else "none"
            raise InputError(
                f"{command.prog}: takes no {word}{nearest(word, command.flags())}: of the"
                f" config's keys, {there}"
            )
        if word.startswith("--") and section not in SECTIONS:
            section, dot, key = word[2:].partition(".")
            known = nearest(word, command.flags())
            if likely := difflib.get_close_matches(section, SECTIONS, n=1):
                known = f" (did you mean '--{likely[0]}{dot}{key}'?)"
            elif likely := _sections_with(key if dot else section):
                known = f" (did you mean '--{likely[0]}.{key if dot else section}'?)"
            raise InputError(f"{command.prog}: unknown flag {word}{known}")
        if not word.startswith("--") and word == rest[0]:
            raise InputError(f"{command.prog}: {word!r} is one word too many")
    return rest


def _sections_with(key: str) -> list[str]:
    """The sections of a config that have this key."""
    from ._config import LoraConfig
    from ._quant_config import QuantConfig
    from .train import DataSection, MeshSection, ModelSection, TrainSection

    sections = {"train": TrainSection, "lora": LoraConfig, "data": DataSection,
                "model": ModelSection, "mesh": MeshSection, "quant": QuantConfig}  # fmt: skip
    name = key.partition("=")[0].replace("-", "_")
    return [own for own, cls in sections.items() if name in cls.__dataclass_fields__]
