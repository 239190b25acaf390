"""What a prompt needs to know of how an adapter was trained: a file beside PEFT's two."""

import json
from pathlib import Path

from .._errors import InputError
from .._files import atomic_file

NOTES_FILE = "training.json"


def write_notes(adapter: Path, *, template: str) -> None:
    """Keep the template an adapter was trained with in its directory."""
    with atomic_file(adapter / NOTES_FILE) as temporary:
        temporary.write_text(json.dumps({"template": template}) + "\n", encoding="utf-8")


def adapter_notes(adapter: str | Path) -> dict[str, str]:
    """What `write_notes` kept; empty for an adapter that came from elsewhere.

    Raises:
        InputError: if the file is broken.
    """
    path = Path(adapter) / NOTES_FILE
    if not path.exists():
        return {}
    try:
        notes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read: {error}") from None
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}
