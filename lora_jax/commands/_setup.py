"""Commands for the place that the program is used in."""

import argparse

from .._errors import InputError
from .._program import PROGRAM
from ._command import Command, Parser


def _test_arguments(p: Parser) -> None:
    p.add_argument("--all", action="store_true", help="the slow ones and the type checker too")


def _install_arguments(p: Parser) -> None:
    p.add_argument(
        "extra", metavar="NAME", choices=("eval", "plan-tpu", "plan-gpu"),
        help="eval: lm-evaluation-harness; plan-tpu, plan-gpu: compilers for machines that need"
        " not be here",
    )  # fmt: skip


def _of_script(options: argparse.Namespace, overrides: list[str]) -> None:
    raise InputError(f"{options.name}: is done by the script {PROGRAM} of a checkout")


SCRIPT = {
    "test": Command(
        "Run the tests; what follows goes to pytest.",
        ("./lora test", "./lora test --all", "./lora test tests/quant -k nf4"),
        _test_arguments,
        _of_script,
    ),
    "install": Command(
        "Add what only some need to .venv.",
        ("./lora install eval", "./lora install plan-tpu"),
        _install_arguments,
        _of_script,
    ),
}
"""What the script of a checkout does itself: here to be listed and completed."""
