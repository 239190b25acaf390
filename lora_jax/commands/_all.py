"""Every command by its name, and the parser that knows them all."""

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence

from .._program import PROGRAM, VERSION
from ._command import Command, Parser
from ._completion import SHELLS, completion
from ._data import DATA
from ._looking import LOOKING
from ._setup import SCRIPT
from ._training import TRAINING
from ._using import USING

_FAMILIES = {"data": "Look at rows as the model will see them, or make rows from documents."}
"""Commands of two words, by the first."""
_WIDTH = 80


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of the commands by name."""
    parser = _Listing(
        prog="lora", description="Fine-tune a model with a low-rank adapter, and use it."
    )
    parser.add_argument("--version", action="version", version=f"lora_jax {VERSION}")
    sub = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    families, made = {}, {}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in families:
            examples = [c.examples[0] for n, c in COMMANDS.items() if n.startswith(f"{first} ")]
            family = _add(sub, first, _FAMILIES[first], examples)
            families[first] = family.add_subparsers(dest="action", metavar="ACTION", required=True)
        place = families[first] if second else sub
        made[name] = _add(place, second or first, command.text, command.examples)
        made[name].set_defaults(name=name)
        command.arguments(made[name])
    return parser, made


class _Listing(Parser):
    """Its help lists the commands in groups."""

    def format_help(self) -> str:
        lines = [f"usage: {PROGRAM} COMMAND [ARGUMENTS]", "", str(self.description)]
        for group, own in GROUPS.items():
            lines += ["", f"{group}:", *(_entry(name, c.text) for name, c in own.items())]
        return "\n".join(
            [*lines, "", f"{PROGRAM} COMMAND --help shows arguments and examples.", ""]
        )


def _add(
    place: "argparse._SubParsersAction[Parser]", name: str, text: str, examples: Sequence[str]
) -> Parser:
    epilog = "\n".join(["examples:", *map(_example, examples)])
    return place.add_parser(name, help=text, description=_filled(text), epilog=epilog)


def _entry(name: str, text: str) -> str:
    return _filled(text, f"  {name:<12}", " " * 14)


def _example(command: str) -> str:
    """As somebody would type it; what is long goes on before a flag in another line."""
    parts = re.split(" (?=--)", command.replace("./lora ", f"{PROGRAM} "))
    whole = " ".join(part.replace(" ", "\0") for part in parts)
    lines = _filled(whole, "  ", "      ", width=_WIDTH - 2).replace("\0", " ")
    return lines.replace("\n", " \\\n")


def _filled(text: str, first: str = "", rest: str = "", width: int = _WIDTH) -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _completion_arguments(p: Parser) -> None:
    p.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _completion(options: argparse.Namespace, overrides: list[str]) -> None:
    parser, made = parsers()
    sections = {name: command.sections for name, command in COMMANDS.items()}
    print(completion(options.shell, parser, made, sections))


SETUP = {
    "completion": Command(
        "Print a script for a shell, which completes commands, flags, config keys and values.",
        (
            "./lora completion bash > ~/.lora.bash   # in ~/.bashrc: source ~/.lora.bash",
            "./lora completion zsh > ~/.zsh/_lora   # in ~/.zshrc, first: fpath+=~/.zsh",
            "./lora completion fish > ~/.config/fish/completions/lora.fish",
        ),
        _completion_arguments,
        _completion,
    ),
    **(SCRIPT if PROGRAM == "./lora" else {}),
}
GROUPS: Mapping[str, Mapping[str, Command]] = {
    "train": TRAINING,
    "look": LOOKING,
    "use": USING,
    "data": DATA,
    "set up": SETUP,
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
