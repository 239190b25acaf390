"""Records that are kept as they come: work cut short goes on, and a file is whole or not there."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._files import atomic_file


def open_records(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records that earlier work with the same settings left in `.NAME.part`, if it was cut short.

    Raises:
        InputError: if `path` is there already, or the work had other settings.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "answers.jsonl")
        ...     assert open_records(path, {"seed": 0}) == []
        ...     add_records(path, {"seed": 0}, [{"row": 1}])
        ...     print(open_records(path, {"seed": 0}), path.exists())
        ...     close_records(path, [{"row": 0}, {"row": 1}])
        ...     print(path.read_text().splitlines())
        [{'row': 1}] False
        ['{"row": 0}', '{"row": 1}']
    """
    if path.exists():
        raise InputError(f"{path}: exists already; give another file, or remove it")
    part = _part(path)
    lines = _whole_lines(part)
    if not lines:
        part.unlink(missing_ok=True)
        return []
    begun, wanted = lines[0], json.loads(json.dumps(settings))
    if begun != wanted:
        other = next(name for name in (*begun, *wanted) if begun.get(name) != wanted.get(name))
        raise InputError(
            f"{part}: was begun with {other} {begun.get(other)!r}, now it is"
            f" {wanted.get(other)!r}; go on with the same settings, remove it, or give another file"
        )
    _write(part, lines)  # without a last line that was cut off
    return lines[1:]


def add_records(
    path: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Keep records; the first of them stand below their settings."""
    part = _part(path)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a", encoding="utf-8") as file:
            file.write(_lines(records if file.tell() else [settings, *records]))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{part}: cannot write: {error.strerror or error}") from None


def close_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the whole file at once; what was kept on the way goes."""
    _write(path, records)
    _part(path).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _whole_lines(part: Path) -> list[dict[str, Any]]:
    if not part.exists():
        return []
    lines = part.read_text("utf-8", errors="replace").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise InputError(f"{part}: not JSON; remove it to start anew") from None


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(_lines(records), encoding="utf-8")


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
