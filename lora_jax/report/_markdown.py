"""A page as Markdown."""

import re
from collections.abc import Sequence

from ._blocks import Block, Code, Folded, Lines, Marked, Page, Picture, Table, Text, visible

_MARKS = re.compile(r"([\\`*<>\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def markdown(page: Page) -> str:
    """The page as Markdown; its pictures are files beside it."""
    parts = [f"# {escaped(page.title)}", *map(_block, page.lead)]
    for section in page.filled:
        parts += [f"## {escaped(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text in one line, nothing of which is markup.

    Example:
        >>> print(escaped("a *b*\\n<script> snake_case __init__"))
        a \\*b\\* \\<script\\> snake_case \\_\\_init\\_\\_
    """
    return _MARKS.sub(r"\\\1", " ".join(visible(text).split()))


def table(given: Table) -> str:
    """A table whose columns stand below each other in plain text too.

    Example:
        >>> print(table(Table(["", "before"], [["loss", "2.5"], ["accuracy", "0.25"]])))
        |          | before |
        |----------|-------:|
        | loss     |    2.5 |
        | accuracy |   0.25 |
    """
    columns = zip(
        *([escaped(cell) for cell in row] for row in (given.head, *given.rows)), strict=True
    )
    drawn = [_column(cells, right) for cells, right in zip(columns, given.numbers, strict=True)]
    return "\n".join(f"|{'|'.join(row)}|" for row in zip(*drawn, strict=True))


def _column(cells: Sequence[str], right: bool) -> list[str]:
    width = max(map(len, cells))
    head, *rest = (f" {cell.rjust(width) if right else cell.ljust(width)} " for cell in cells)
    return [head, "-" * (width + 1) + ("-:"[right]), *rest]


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return escaped(text)
        case Lines(lines):
            return "\n".join(f"- {escaped(line)}" for line in lines)
        case Code(text):
            return _fenced(text)
        case Marked(title, spans):
            marked = "".join(f"⟦{text}⟧" if mark else text for text, mark in spans)
            return f"{escaped(title)}\n\n{_fenced(marked)}"
        case Table():
            return table(block)
        case Picture(name=name, alt=alt, caption=caption):
            return f"![{escaped(alt)}]({name})" + (f"\n\n{escaped(caption)}" if caption else "")
        case Folded(title, code):
            return f"{escaped(title)}:\n\n{_fenced(code.text)}"


def _fenced(text: str) -> str:
    """A code block that its own text does not end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text).rstrip()}\n{fence}"
