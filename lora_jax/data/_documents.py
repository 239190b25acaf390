"""Documents to questions and answers: by heading, by numbered article, by question."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from ._sources import read_text, table_rows

SUFFIXES = (".txt", ".md", ".csv")
_HEADING = re.compile(r"(#{1,6})\s+(\S.*)")
# The line below a title that is underlined instead.
_UNDERLINE = re.compile(r"(=+|-{2,})\s*$")
# Backticks that close again on their line are code within a text.
_FENCE = re.compile(r"\s*(`{3,}(?!.*`)|~{3,})(.*)")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_QUESTION = re.compile(r"^\W{0,4}(?:Q|Question|Frage)\s*\d*\s*[:.)]\W{0,3}\s*(.+)$", re.I)
_ANSWER = re.compile(r"^\W{0,4}(?:A|Answer|Antwort)\s*\d*\s*[:.)]\**\s*(.*)$", re.I)
_ARTICLE = re.compile(
    r"^((?:Article|Art\.|Artikel|Section|Clause|Rule)\s+(?:\d+[a-z]?|[IVXLC]+)(?![\w])"
    r"|§+\s*\d+[a-z]?|\d+(?:\.\d+)+(?=\.?\s+[^\W\d_a-z]))[.:)]?(?:\s+(.*))?$"
)
# A bare number may count a list's items too: a title has a capital and is no sentence.
_NUMBERED = re.compile(r"^(\d{1,3}[.)])\s+([^\W\d_a-zß-ÿ][^.;:,!?]{0,98})$")
_QUESTION_COLUMNS = ("question", "q", "prompt", "query", "instruction", "frage")
_ANSWER_COLUMNS = ("answer", "a", "response", "reply", "output", "completion", "antwort")
_LONGEST_TITLE = 100


@dataclasses.dataclass(frozen=True)
class Made:
    """One instruction row: what was asked, the answer, the rule it came by, and its line."""

    instruction: str
    output: str
    rule: str
    line: int


@dataclasses.dataclass(frozen=True)
class _Section:
    """Lines below a heading, which stands on line `start` under those of lower level."""

    titles: tuple[tuple[int, str], ...]
    lines: list[str]
    start: int


def document_rows(path: Path, name: str) -> tuple[list[Made], int]:
    """The rows of one document, and how many of its lines no rule could use.

    `name` is what the document is called in the questions.
    """
    if path.suffix.lower() == ".csv":
        return _table_rows(path), 0
    text = read_text(path).replace("\r\n", "\n")
    rows, unused = [], 0
    for section in _sections(text, markdown=path.suffix.lower() == ".md"):
        found = _section_rows(section, name)
        claimed = found[0].line - section.start - 1 if found else None
        unused += sum(bool(line.strip()) for line in section.lines[:claimed])
        rows += found
    return rows, unused


def _section_rows(section: _Section, name: str) -> list[Made]:
    for rule in (_question_rows, _article_rows, _numbered_rows):
        found = list(rule(section, name))
        if any(row.output for row in found):
            return found
    body = "\n".join(section.lines).strip()
    if not section.titles or not body:
        return []
    *above, title = (title for _, title in section.titles)
    return [Made(_ask(title, " / ".join(above) or name), body, "heading", section.start + 1)]


def _ask(title: str, context: str) -> str:
    """A question that the text under a title answers; a title may be one already."""
    if title.endswith("?"):
        return title
    return f'What does "{context}" say under "{title}"?'


def _sections(text: str, *, markdown: bool) -> Iterator[_Section]:
    """A Markdown text cut at its headings; any other text as a whole."""
    matter = _FRONT_MATTER.match(text) if markdown else None
    skipped = matter[0].count("\n") if matter else 0
    lines = text.split("\n")
    section, fence = _Section((), [], skipped), ""
    for number, line in enumerate(lines[skipped:], skipped + 1):
        fence = _open_fence(line, fence)
        heading = _heading(lines, number - 1, skipped) if markdown and not fence else None
        if heading:
            yield section
            level, title = heading
            above = [title for title in section.titles if title[0] < level]
            section = _Section((*above, (level, title)), [], number)
        elif not (
            section.titles and not section.lines and _is_underline(lines, number - 1, skipped)
        ):
            section.lines.append(line)
    yield section


def _heading(lines: list[str], i: int, first: int) -> tuple[int, str] | None:
    """Level and title of a heading on line `i`, marked by signs before it or underlined."""
    if marked := _HEADING.match(lines[i]):
        return len(marked[1]), marked[2].rstrip().rstrip("#").rstrip()
    if _is_underline(lines, i + 1, first):
        return (1 if lines[i + 1].startswith("=") else 2), lines[i].strip()
    return None


def _is_underline(lines: list[str], i: int, first: int) -> bool:
    """Whether line `i` underlines a title: one line of text with nothing before it.

    The text begins with line `first`.
    """
    if not first < i < len(lines) or not _UNDERLINE.match(lines[i]):
        return False
    title, alone = lines[i - 1], i - 2 < first or not lines[i - 2].strip()
    return alone and bool(re.match(r"\s{0,3}\w", title)) and len(title) <= _LONGEST_TITLE


def _open_fence(line: str, fence: str) -> str:
    """The fence of the code block that goes on after this line, if any."""
    found = _FENCE.match(line)
    if not found:
        return fence
    if not fence:
        return found[1]
    closes = found[1].startswith(fence) and not found[2].strip()
    return "" if closes else fence


def _question_rows(section: _Section, name: str) -> Iterator[Made]:
    question, answer, start = "", None, 0
    for number, line in enumerate([*section.lines, "Q: end"], section.start + 1):
        asked, answered = _QUESTION.match(line), _ANSWER.match(line)
        if asked:
            if question:
                text = "\n".join(answer or []).strip()
                yield Made(question, text, "question and answer", start)
            question, answer, start = asked[1].strip("* "), None, number
        elif question and answer is None and answered:
            answer = [answered[1]]
        elif answer is not None:
            answer.append(line)
        elif question and line.strip():
            question = f"{question} {line.strip('* ')}"


def _numbered_rows(section: _Section, name: str) -> list[Made]:
    """Articles that have a bare number, "1. Scope"; items of a list have no text below them."""
    rows = list(_article_rows(section, name, _NUMBERED))
    return rows if len(rows) > 1 and all(row.output for row in rows) else []


def _article_rows(
    section: _Section, name: str, pattern: re.Pattern[str] = _ARTICLE
) -> Iterator[Made]:
    label, body, start, after_blank = "", [], 0, True
    for number, line in enumerate(section.lines, section.start + 1):
        # A wrapped sentence may begin with "Article 5" too, but no blank line stands before it.
        article = pattern.match(line.strip().strip("*")) if after_blank else None
        if article:
            if label:
                yield _article(label, body, name, start)
            title = (article[2] or "").strip()
            is_title = len(title) <= _LONGEST_TITLE and not title.endswith((".", ";", ","))
            label = f"{article[1]} {title}".strip() if is_title else article[1]
            body, start = [] if is_title else [title], number
        elif body or not (label and _UNDERLINE.match(line)):
            body.append(line)
        after_blank = not line.strip() or article is not None
    if label:
        yield _article(label, body, name, start)


def _article(label: str, body: list[str], name: str, start: int) -> Made:
    return Made(_ask(label, name), "\n".join(body).strip(), "numbered article", start)


def _table_rows(path: Path) -> list[Made]:
    rows = []
    for line, row in table_rows(path):
        cells = {column.lower(): (cell or "").strip() for column, cell in row.items()}
        question = next((cells[c] for c in _QUESTION_COLUMNS if c in cells), None)
        answer = next((cells[c] for c in _ANSWER_COLUMNS if c in cells), None)
        if question is not None and answer is not None:
            rows.append(Made(question, answer, "table", line))
    return rows
