"""Files of rows, each row with the place it came from."""

import csv
import dataclasses
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._errors import InputError, first_line

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md")


@dataclasses.dataclass(frozen=True)
class Record:
    """The columns of one row as the file has them, and its place."""

    values: dict[str, Any]
    where: str


def read_records(path: Path) -> Iterator[Record]:
    """Rows of one file, by its suffix."""
    if path.is_dir():
        files = [p.name for p in sorted(path.iterdir()) if p.suffix in SUFFIXES][:5]
        hint = f"give one of its files ({', '.join(files)})" if files else "give a file of rows"
        raise InputError(f"{path}: is a directory; {hint}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown kind of file; give one of {' '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return reader(path)


def read_text(path: Path) -> str:
    """A whole file as UTF-8, without its byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None


def _json_lines(path: Path) -> Iterator[Record]:
    return _parse_lines(path, read_text(path))


def _parse_lines(path: Path, text: str) -> Iterator[Record]:
    # Only "\n" ends a line: a string may hold other characters that splitlines() breaks at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}:{number}: not JSON ({_reason(error)}); write one object a line"
                ) from None
            yield _record(value, f"{path}:{number}")


def _json(path: Path) -> Iterator[Record]:
    text = read_text(path)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from _parse_lines(path, text)
            return
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not JSON ({_reason(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    for number, value in enumerate(content if isinstance(content, list) else [content]):
        yield _record(value, f"{path}[{number}]")


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, cells by column) of a table; its header shows whether , ; or tab parts the cells."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    # A cell may hold a whole document.
    csv.field_size_limit(2**31 - 1)
    # Not splitlines(): it breaks cells at characters that end no line of a table.
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
        if repeated := sorted({column for column in header if header.count(column) > 1}):
            raise InputError(f"{path}:1: the column {repeated[0]!r} stands twice; rename one")
        reader.fieldnames = header
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path}:{reader.line_num}: more cells than the header has columns"
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + 1}: not CSV ({error})") from None


def _csv(path: Path) -> Iterator[Record]:
    for line, row in table_rows(path):
        yield Record(dict(row), f"{path}:{line}")


def _parquet(path: Path) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs pyarrow; run pip install pyarrow, or save the rows as JSONL"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow has its own family of errors, and may be absent.
        raise InputError(f"{path}: not a whole Parquet file ({first_line(error)})") from None
    for number, row in enumerate(rows):
        yield Record(row, f"{path}[{number}]")


def _document(path: Path) -> Iterator[Record]:
    text = read_text(path)
    if text.strip():
        yield Record({"text": text}, str(path))


_READERS = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _document,
    ".md": _document,
}


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row must be an object, got {type(value).__name__}")
    return Record(value, where)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
