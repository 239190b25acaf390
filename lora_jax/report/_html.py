"""A page as one HTML file that needs nothing beside it."""

import html as entities
import io
import re
from importlib.resources import files

from ._blocks import Block, Code, Folded, Lines, Marked, Page, Picture, Table, Text, visible


def page_html(page: Page) -> str:
    """The page as HTML: its style and its pictures are inside, and nothing is fetched or run."""
    style = (files(__package__ or "") / "page.css").read_text("utf-8")
    sections = (
        f"<section>\n<h2>{escape(section.title)}</h2>\n"
        + "\n".join(map(_block, section.blocks))
        + "\n</section>"
        for section in page.filled
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(page.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escape(page.title)}</h1>",
            *map(_block, page.lead),
            *sections,
            "</main>",
            "</body>",
            "</html>\n",
        ]
    )


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Lines(lines):
            return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Marked(title, spans):
            marked = "".join(
                f"<mark>{escape(text)}</mark>" if mark else escape(text) for text, mark in spans
            )
            return f"<p>{escape(title)}</p>\n<pre>{marked}</pre>"
        case Table():
            return _table(block)
        case Picture():
            caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
            return f"<figure>{svg(block)}{caption}</figure>"
        case Folded(title, code):
            return f"<details><summary>{escape(title)}</summary>{_block(code)}</details>"


def _table(table: Table) -> str:
    sides = [' class="number"' if right else "" for right in table.numbers]
    top = "".join(
        f'<th scope="col"{side}>{escape(cell)}</th>'
        for side, cell in zip(sides, table.head, strict=True)
    )
    rows = []
    for name, *cells in table.rows:
        numbers = "".join(
            f"<td{side}>{escape(cell)}</td>" for side, cell in zip(sides[1:], cells, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{numbers}</tr>')
    head = f"<thead><tr>{top}</tr></thead>\n" if any(table.head) else ""
    body = "\n".join(rows)
    # It scrolls by itself on a narrow screen, and by the keyboard too.
    return (
        f'<div class="scroll" tabindex="0"><table>\n{head}<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def svg(picture: Picture) -> str:
    """A figure as an SVG element whose black takes the colour of the text around it."""
    import matplotlib

    file, stem = io.StringIO(), picture.name.partition(".")[0]
    # Text stays text, and the same figure gives the same letters.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem}):
        picture.figure.savefig(file, format="svg", transparent=True)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("#000000", "currentColor")
    # Several pictures on a page must not share names.
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{stem}-", drawn)
    label = f'<svg role="img" aria-label="{escape(picture.alt)}" fill="currentColor"'
    return drawn.replace("<svg", label, 1).strip()


def escape(text: str) -> str:
    """A text as the text of an element or an attribute."""
    return entities.escape(visible(text))
