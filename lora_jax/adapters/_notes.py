"""What a prompt needs to know of how an adapter was trained: a file beside PEFT's two."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._files import atomic_file

NOTES_FILE = "training.json"


def write_notes(adapter: Path, *, template: str, add_tokens: Sequence[str] = ()) -> None:
    """Keep in an adapter's directory the template and the tokens that it was trained with."""
    notes = {"template": template, **({"add_tokens": list(add_tokens)} if add_tokens else {})}
    with atomic_file(adapter / NOTES_FILE) as temporary:
        text = json.dumps(notes, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def adapter_notes(adapter: str | Path) -> dict[str, Any]:
    """What `write_notes` kept; empty for an adapter that came from elsewhere.

    Raises:
        InputError: if the file is broken.
    """
    path = Path(adapter) / NOTES_FILE
    if not path.exists():
        return {}
    try:
        notes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read: {error}") from None
    if not isinstance(notes, dict):
        return {}
    kinds = {"template": str, "add_tokens": list}
    return {k: v for k, v in notes.items() if isinstance(v, kinds.get(k, ()))}
