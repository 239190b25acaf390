"""A run's `metrics.jsonl`, read back."""

import json
import math
from pathlib import Path
from typing import Any

from .._errors import InputError


def read_records(directory: str | Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that was cut off is left out.

    Of a record its finite numbers are read: a loss or a norm that overflowed is not in it.

    Raises:
        InputError: if there is no such file, or another line is not JSON or no record.
    """
    path = Path(directory) / "metrics.jsonl"
    records = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        raise InputError(f"{path}: no such file; a run's directory holds one") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text in UTF-8; delete it, or train anew") from None
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not JSON") from None
        if not isinstance(found, dict) or type(found.get("step")) is not int:
            raise InputError(
                f"{path}:{number}: not a record, which has a whole number as its step; delete the"
                " line"
            )
        records.append({key: value for key, value in found.items() if _is_finite(value)})
    return records


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that hold `key`.

    Example:
        >>> series([{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}], "loss")
        ([1], [2.0])
    """
    chosen = [r for r in records if key in r]
    return [r["step"] for r in chosen], [r[key] for r in chosen]
