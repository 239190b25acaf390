"""Directories by the names that the Hugging Face Hub knows them by."""

import re
from collections.abc import Sequence
from pathlib import Path

from ._errors import InputError, first_line

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WEIGHTS = "*.safetensors"
DESCRIPTION = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What a model's directory holds besides its weights."""


def local_directory(path: str | Path, patterns: Sequence[str]) -> Path:
    """A directory as it is, or what the Hub has under its name, downloaded once and kept.

    A name is `owner/model` or `owner/model@revision`, where no such directory is; only files of
    its top folder that match a pattern are fetched, and never a pickle.

    Args:
        path: The directory or the name.
        patterns: Which files are needed.

    Raises:
        InputError: if it looks like a name, but the extra `hub` is missing or the Hub does not
            give it.

    Example:
        >>> local_directory("/models/mine", [WEIGHTS]).name
        'mine'
    """
    named, path = _NAME.fullmatch(str(path)), Path(path)
    if named is None or path.parts[0] in (".", "..") or path.parent.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{path}: no such directory; to have it from the Hugging Face Hub by this name, install"
            " the extra: pip install 'lora_jax[hub]'"
        ) from None
    try:
        found = snapshot_download(
            named["repo"],
            revision=named["revision"],
            allow_patterns=list(patterns),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, ValueError) as error:  # what the Hub's own errors are made of
        raise InputError(
            f"{path}: no such directory, and the Hub does not give it: {first_line(error)}"
        ) from None
    return Path(found)
