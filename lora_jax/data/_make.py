"""A folder of documents to instruction rows, split by document, with a card."""

import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .._errors import InputError
from .._files import atomic_directory
from ._documents import SUFFIXES, Made, document_rows

_LONG_ANSWER = 40
"""From so many characters on, the same answer in two rows means the same text, not chance."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What `make_rows` did.

    Args:
        directory, output: Where the documents were, and where the rows are.
        train, held_out: Rows in `train.jsonl` and `eval.jsonl`.
        documents: Document to rule to kept rows.
        held_out_documents: The documents whose rows are held out.
        dropped: Reason to count of rows left out.
        unused_lines: Document to lines that belong to no heading, article or question.
        empty: Documents that gave no row.
        notes: Things worth knowing, a sentence each.
    """

    directory: str
    output: str
    train: int
    held_out: int
    documents: Mapping[str, Mapping[str, int]]
    held_out_documents: tuple[str, ...]
    dropped: Mapping[str, int]
    unused_lines: Mapping[str, int]
    empty: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The card as the text of `README.md`."""
        lines = [
            "# Instruction rows",
            "",
            f"Made from the documents in `{self.directory}`, kept in `{self.output}`:"
            f" {self.train} rows in `train.jsonl`, {self.held_out} in `eval.jsonl`. Each row has"
            " `instruction`, `output`, the `rule` it came by, and its `source`.",
            "",
            "Rules: the text under a Markdown heading or a numbered article answers what it says;"
            " a question is answered by the answer beside it, in a text or a table.",
            "Rows that repeat another (case, spacing and punctuation aside) were removed, then"
            " whole documents were held out, so that no document is on both sides.",
            "",
            "| document | rule | rows | held out |",
            "|---|---|---|---|",
        ]
        for name, rules in self.documents.items():
            held = "yes" if name in self.held_out_documents else "no"
            lines += [f"| {name} | {rule} | {count} | {held} |" for rule, count in rules.items()]
        lines += ["", f"Left out: {sum(self.dropped.values())} rows."]
        lines += [f"- {count}: {reason}" for reason, count in self.dropped.items()]
        lines += [
            f"- {name}: {count} lines belong to no heading, article or question"
            for name, count in self.unused_lines.items()
        ]
        lines += [f"- {name}: no heading, article or question found" for name in self.empty]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines) + "\n"


def make_rows(
    directory: str | Path, output: str | Path, *, held_out: float = 0.1, seed: int = 0
) -> Card:
    """Turn text, Markdown and CSV files into instruction rows.

    Args:
        directory: Where the documents are; folders below are read too, hidden ones are not.
        output: A new directory for `train.jsonl`, `eval.jsonl` and `README.md`.
        held_out: Share of the rows to hold out, by whole documents.
        seed: Decides which documents.

    Returns:
        What was done; `README.md` says the same.

    Raises:
        InputError: if there are no documents, none gives a row, one cannot be read, or
            `output` exists or lies in `directory`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "docs").mkdir()
        ...     _ = (Path(folder) / "docs/guide.md").write_text("# How do I stop?\\nPress q.\\n")
        ...     make_rows(f"{folder}/docs", f"{folder}/rows").documents
        {'guide.md': {'heading': 1}}
    """
    directory, output = Path(directory), Path(output)
    if not 0.0 <= held_out < 1.0:
        raise InputError(f"data make: held_out must be in [0, 1), got {held_out}")
    if directory.resolve() in output.resolve().parents:
        raise InputError(
            f"{output}: lies in {directory}, so its card would be read as a document next time;"
            " give an output elsewhere"
        )
    read = {name: document_rows(path, name) for path, name in _documents(directory)}
    documents = {name: rows for name, (rows, _) in read.items()}
    kept, dropped = _without_repeats(documents)
    if not kept:
        raise InputError(
            f"{directory}: no heading, numbered article or question in {len(documents)} documents;"
            " add headings, or rows as JSONL"
        )
    chosen = _held_out({name: len(rows) for name, rows in kept.items()}, held_out, seed)
    train = {name: rows for name, rows in kept.items() if name not in chosen}
    held = {name: rows for name, rows in kept.items() if name in chosen}
    note = "Only one document gave rows, so nothing could be held out by document."
    card = Card(
        directory=str(directory),
        output=str(output),
        train=sum(len(rows) for rows in train.values()),
        held_out=sum(len(rows) for rows in held.values()),
        documents={name: dict(Counter(row.rule for row in rows)) for name, rows in kept.items()},
        held_out_documents=tuple(held),
        dropped=dropped,
        unused_lines={name: unused for name, (_, unused) in read.items() if unused},
        empty=tuple(name for name, rows in documents.items() if not rows),
        notes=(note,) if held_out > 0 and not chosen else (),
    )
    with atomic_directory(output) as temporary:
        (temporary / "train.jsonl").write_text(_json_lines(train), "utf-8")
        (temporary / "eval.jsonl").write_text(_json_lines(held), "utf-8")
        (temporary / "README.md").write_text(card.markdown(), "utf-8")
    return card


def _documents(directory: Path) -> list[tuple[Path, str]]:
    if not directory.is_dir():
        raise InputError(f"{directory}: is not a directory; give a folder of documents")
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            found.append((path, name))
    if not found:
        raise InputError(f"{directory}: holds no document; put {', '.join(SUFFIXES)} files there")
    return found


def _without_repeats(
    documents: Mapping[str, list[Made]],
) -> tuple[dict[str, list[Made]], dict[str, int]]:
    """Rows of each document that say something new; a repeat would leak into the held-out."""
    pairs: set[tuple[str, str]] = set()
    answers: set[str] = set()
    kept: dict[str, list[Made]] = {}
    dropped: Counter[str] = Counter()
    for name, rows in documents.items():
        for row in rows:
            # Without the document's name: a copy under another name says nothing new.
            question = _normalised(row.instruction.replace(name, ""))
            answer = _normalised(row.output)
            if not row.instruction.strip() or not row.output.strip():
                dropped["no question or no answer"] += 1
            elif (question, answer) in pairs or answer in answers:
                dropped["repeats an earlier row"] += 1
            else:
                kept.setdefault(name, []).append(row)
                pairs.add((question, answer))
                if len(answer) >= _LONG_ANSWER:
                    answers.add(answer)
    return kept, dict(dropped)


def _normalised(text: str) -> str:
    """Case, spacing and punctuation aside, unless there is nothing else."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if unicodedata.category(c).startswith("P") else c for c in plain).split()
    return " ".join(words or plain.split())


def _held_out(sizes: Mapping[str, int], share: float, seed: int) -> set[str]:
    """Documents in an order drawn by hash, as long as they fit into the share of the rows."""
    if share == 0 or len(sizes) < 2:
        return set()
    wanted, taken, chosen = share * sum(sizes.values()), 0, set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if taken + sizes[name] <= wanted:
            chosen.add(name)
            taken += sizes[name]
    # None is small enough: the smallest one is the nearest to the share.
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def _json_lines(documents: Mapping[str, list[Made]]) -> str:
    return "".join(
        json.dumps(
            {
                "instruction": row.instruction,
                "input": "",
                "output": row.output,
                "rule": row.rule,
                "source": f"{name}:{row.line}",
            },
            ensure_ascii=False,
        )
        + "\n"
        for name, rows in documents.items()
        for row in rows
    )
