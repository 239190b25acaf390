"""Where a command writes: a terminal, a file or a pipe."""

from collections.abc import Callable
from typing import Any


def new_console() -> Any:
    """A console of rich on the standard output."""
    from rich.console import Console

    console = Console()
    # Lines stay whole in a file or a pipe, and break between words on a terminal.
    console.soft_wrap = not console.is_terminal
    return console


def writer(console: Any) -> Callable[[Any], None]:
    """What writes a text as it is."""
    return lambda text: console.print(text, markup=False, highlight=False)
