"""What a page is made of, before it is Markdown or HTML."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Lines:
    """A list."""

    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines that are kept as they are."""

    text: str


@dataclasses.dataclass(frozen=True)
class Marked:
    """A text in stretches, of which some are marked, under a title."""

    title: str
    spans: Sequence[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Names of columns, and rows that begin with a name; columns of numbers stand on the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numbers(self) -> list[bool]:
        """Which columns hold numbers alone."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        return [
            i > 0 and all(cell[:1] in "+-0123456789" for cell in column)
            for i, column in enumerate(columns)
        ]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A matplotlib figure, the name of its file, and what it shows to who cannot see it."""

    figure: Any
    name: str
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Folded:
    """What is long, behind a line that opens it."""

    title: str
    block: Code


Block = Text | Lines | Code | Marked | Table | Picture | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a heading; without any it is left out."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Page:
    """A title, blocks that need no heading, and sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]

    @property
    def filled(self) -> list[Section]:
        return [section for section in self.sections if section.blocks]

    @property
    def pictures(self) -> list[Picture]:
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Picture)]


def percent(share: float, form: str = ".1f") -> str:
    """A share in hundredths.

    Example:
        >>> percent(0.0512), percent(-0.2, "+.0f")
        ('5.1 %', '-20 %')
    """
    return f"{100 * share:{form}} %"


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def visible(text: str) -> str:
    """A text whose control characters are pictures of them: a page must not hold such.

    Example:
        >>> visible("a\\x1b[1m\\n")
        'a␛[1m\\n'
    """
    return text.translate(_CONTROLS)
