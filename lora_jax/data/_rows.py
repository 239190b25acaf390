"""Rows of training data: one shape for every format that people write them in."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import InputError, nearest
from ._sources import Record, read_records
from ._stdlib import docstring_rows
from ._turns import TURN_KEYS, BadRow, Message, cell_text, read_tools, read_turns

FORMATS = ("alpaca", "messages", "sharegpt", "prompt_completion", "text")
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns by which a format is known, in the order they are looked for."""
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}
_OUR_NAMES = {
    name for table in (_REQUIRED, _OPTIONAL) for names in table.values() for name in names
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: a conversation, or a plain text (then `messages` is empty).

    `index` counts the rows of all sources from 0; `where` names the place in its file; `tools` are
    the JSON schemas of what the conversation may call.
    """

    messages: tuple[Message, ...]
    text: str
    index: int
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a source and what was found out about it.

    Args:
        rows: The rows in the order of the source.
        format: One of `FORMATS`, as given or detected.
        source: The file, files or word they came from.
        columns: Our names to the columns of the file that were read.
        unused: Columns of the file that were not read.
        dropped: Reason to count of the rows left out (only where that was asked for).
    """

    rows: tuple[Row, ...]
    format: str
    source: str
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def read_rows(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    bad_rows: str = "error",
) -> Rows:
    """Read rows of instructions, conversations or plain text.

    Args:
        source: A file (`.json .jsonl .csv .tsv .parquet .txt .md`), several, or the word `stdlib`
            or `stdlib-heldout`: rows made from the running Python's own standard library.
        format: One of `FORMATS`; `"auto"` tells it from the columns.
        columns: Our column names to the file's, for instance
            `{"instruction": "question", "output": "answer"}`.
        limit: Read at most so many rows.
        bad_rows: What a row without an answer (or otherwise unusable) gets: `"error"`, or
            `"skip"`, which counts it in `dropped`.

    Returns:
        The rows, in the order of the source.

    Raises:
        InputError: with the file and line, if something is not what it should be.

    Example:
        >>> rows = read_rows("stdlib-heldout", limit=2)
        >>> len(rows), rows.format, [message.role for message in rows.rows[0].messages]
        (2, 'alpaca', ['user', 'assistant'])
    """
    _check_options(format, columns, limit, bad_rows)
    records = list(_records(source, limit))
    name = _source_name(source)
    if not records:
        raise InputError(f"{name}: holds no rows; give a file with at least one")
    present = list(dict.fromkeys(column for record in records for column in record.values))
    mapping = _mapping(name, present, columns or {})
    format_name = _detect(name, present, mapping) if format == "auto" else format
    used = {our: mapping[our] for our in _names(format_name) if our in mapping}
    _check_columns(name, format_name, present, used)
    rows, dropped = [], Counter()
    for record in records:
        try:
            values = {our: record.values.get(column) for our, column in used.items()}
            messages, text = _READERS[format_name](values)
            tools = read_tools(values.get("tools"), bare=format_name == "sharegpt")
            _check_row(format_name, messages, text)
        except BadRow as error:
            if bad_rows == "error":
                raise InputError(f"{record.where}: {error}") from None
            dropped[error.reason] += 1
            continue
        rows.append(Row(messages, text, len(rows), record.where, tools))
    if not rows:
        raise InputError(f"{name}: every row was dropped ({_counts(dropped)})")
    kind = "messages" if _is_conversational(format_name, records, used) else format_name
    unused = [column for column in present if column not in used.values()]
    unused += _unused_in_turns(records, used)
    return Rows(tuple(rows), kind, name, used, tuple(unused), dict(dropped))


def _records(source: Any, limit: int | None) -> Iterator[Record]:
    if limit is not None and limit <= 0:
        return
    count = 0
    for one in [source] if isinstance(source, str | Path) else source:
        if str(one) in ("stdlib", "stdlib-heldout"):
            found = _stdlib_records(str(one))
        else:
            found = read_records(Path(one))
        for record in found:
            yield record
            count += 1
            if count == limit:
                return


def _stdlib_records(word: str) -> Iterator[Record]:
    for number, row in enumerate(docstring_rows(word == "stdlib-heldout")):
        yield Record(dict(row), f"{word}[{number}] ({row['module']})")


def _source_name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else ", ".join(str(s) for s in source)


def _check_options(
    format: str, columns: Mapping[str, str] | None, limit: int | None, bad_rows: str
) -> None:
    if bad_rows not in ("error", "skip"):
        raise InputError(f"data: bad_rows must be error or skip, got {bad_rows!r}")
    if format not in ("auto", *FORMATS):
        raise InputError(
            f"data: format {format!r} is unknown{nearest(format, FORMATS)}; use auto or one of"
            f" {', '.join(FORMATS)}"
        )
    for name in columns or {}:
        if name not in _OUR_NAMES:
            raise InputError(
                f"data: columns maps {name!r}, which is none of our names"
                f"{nearest(name, _OUR_NAMES)}; use {', '.join(sorted(_OUR_NAMES))}"
            )
    if limit is not None and limit < 1:
        raise InputError(f"data: limit must be at least 1, got {limit}")


def _mapping(name: str, present: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names to the file's columns: as given, else where the names are equal."""
    for our, column in columns.items():
        if column not in present:
            raise InputError(
                f"{name}: has no column {column!r} (columns.{our}){nearest(column, present)};"
                f" it has {', '.join(present)}"
            )
    taken = set(columns.values())
    same = {our: our for our in present if our in _OUR_NAMES and our not in taken}
    return {**same, **columns}


def _names(format: str) -> tuple[str, ...]:
    return (*_REQUIRED[format], *_OPTIONAL[format])


def _detect(name: str, present: list[str], mapping: Mapping[str, str]) -> str:
    if {"chosen", "rejected"} <= set(present) - set(mapping.values()):
        raise InputError(
            f"{name}: holds preference pairs (chosen, rejected), which are not supported; give"
            " rows with one answer each"
        )
    for format, required in _REQUIRED.items():
        if all(our in mapping for our in required):
            return format
    raise InputError(
        f"{name}: no format fits the columns {', '.join(present)}; map them, for instance"
        " columns: {instruction: question, output: answer}"
    )


def _check_columns(name: str, format: str, present: list[str], used: Mapping[str, str]) -> None:
    for our in _REQUIRED[format]:
        if our not in used:
            raise InputError(
                f"{name}: format {format} needs a column {our!r}{nearest(our, present)}; it has"
                f" {', '.join(present)}; map it with columns: {{{our}: …}}"
            )


def _is_conversational(format: str, records: list[Record], used: Mapping[str, str]) -> bool:
    """A prompt given as messages is a conversation, whatever the column is called."""
    return format == "prompt_completion" and isinstance(records[0].values.get(used["prompt"]), list)


def _unused_in_turns(records: list[Record], used: Mapping[str, str]) -> list[str]:
    """What turns hold that a template may or may not show, `messages.reasoning_content` say."""
    columns = [used[name] for name in ("messages", "conversations") if name in used]
    found = {
        f"{column}.{key}": None
        for column in columns
        for record in records
        for turn in record.values.get(column) or []
        if isinstance(turn, dict)
        for key, value in turn.items()
        if key not in TURN_KEYS and value
    }
    return list(found)


def _alpaca(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    messages = [*_system(values)]
    for pair in values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("the history is not a list of pairs", "write [[question, answer], …]")
        messages += [Message("user", cell_text(pair[0], "history")), _answer(pair[1], "history")]
    instruction = cell_text(values.get("instruction"), "instruction")
    extra = cell_text(values.get("input"), "input")
    if not instruction and not extra:
        raise BadRow("no instruction", "give one, or remove the row")
    question = Message("user", instruction, extra) if instruction else Message("user", extra)
    return (*messages, question, _answer(values.get("output"), "output")), ""


def _prompt_completion(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return (*_system(values), *read_turns([*prompt, *completion])), ""
    question = Message("user", cell_text(prompt, "prompt"))
    return (*_system(values), question, _answer(completion, "completion")), ""


def _conversation(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    turns = values["messages"] if "messages" in values else values["conversations"]
    messages = read_turns(turns)
    if messages and messages[0].role == "system":
        return messages, ""
    return (*_system(values), *messages), ""


def _plain_text(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    text = cell_text(values.get("text"), "text")
    if not text.strip():
        raise BadRow("no text", "give some, or remove the row")
    return (), text


_READERS = {
    "alpaca": _alpaca,
    "messages": _conversation,
    "sharegpt": _conversation,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}


def _system(values: Mapping[str, Any]) -> tuple[Message, ...]:
    text = cell_text(values.get("system"), "system")
    return (Message("system", text),) if text else ()


def _answer(value: Any, column: str) -> Message:
    text = cell_text(value, column)
    if not text.strip():
        raise BadRow(f"no {column}", "give the answer, or remove the row")
    return Message("assistant", text)


def _check_row(format: str, messages: tuple[Message, ...], text: str) -> None:
    if format == "text":
        return
    if not any(m.role == "assistant" and m.written.strip() for m in messages):
        raise BadRow("no answer to learn from", "give an assistant's turn, or remove the row")


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
