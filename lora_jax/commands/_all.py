"""Every command by its name, and the parser that knows them all."""

from collections.abc import Sequence

from ._command import Command, Parser
from ._data import DATA
from ._looking import LOOKING
from ._training import TRAINING
from ._using import USING

COMMANDS: dict[str, Command] = {**TRAINING, **LOOKING, **USING, **DATA}
_FAMILIES = {"data": "Look at rows as the model will see them, or make rows from documents."}
"""Commands of two words, by the first."""
_EXAMPLES = (
    "./lora quickstart",
    "./lora train configs/quickstart.yaml --train.steps 100 --output runs/longer",
    "./lora generate --model DIR --adapter DIR --prompt 'Once upon a time'",
    "./lora test        runs the tests (./lora test --all: the slow ones too)",
)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of the commands by name."""
    parser = Parser(
        prog="lora",
        description="Fine-tune a model with a low-rank adapter, and use it.",
        epilog=_epilog(_EXAMPLES),
    )
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    families, made = {}, {}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in families:
            text = _FAMILIES[first]
            own = [
                line
                for n, c in COMMANDS.items()
                if n.startswith(f"{first} ")
                for line in c.examples
            ]
            family = sub.add_parser(first, help=text, description=text, epilog=_epilog(own))
            families[first] = family.add_subparsers(dest="action", metavar="ACTION", required=True)
        made[name] = (families[first] if second else sub).add_parser(
            second or first,
            help=command.text,
            description=command.text,
            epilog=_epilog(command.examples),
        )
        made[name].set_defaults(name=name)
        command.arguments(made[name])
    return parser, made


def _epilog(examples: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in examples)])
