"""Files written whole or not at all, and tensors read without ever opening a pickle."""

import contextlib
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ._errors import InputError
from ._interrupt import UNFINISHED, remove


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same directory; on success it becomes `path`."""
    path = Path(path)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.touch(exist_ok=False)
        # As the user's umask has it; what writes the file may have made a private one.
        mode = temporary.stat().st_mode
        try:
            yield temporary
            temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            remove(temporary)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory beside `path`; on success it becomes `path`.

    Raises:
        InputError: if `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists already; give another directory or remove it")
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            os.replace(temporary, path)
        finally:
            remove(temporary)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file lazily: `keys()`, `get_tensor(name)` as numpy arrays.

    Raises:
        InputError: if the file is missing, truncated, or something else (a pickle, say).
    """
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(
            f"{path}: pickled weights are never opened, since a pickle may run any program; convert"
            " one you trust, with torch: safetensors.torch.save_file(torch.load("
            f"'{path.name}', weights_only=True), '{path.stem}.safetensors')"
        )
    try:
        handle = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    with handle as tensors:
        yield tensors


def write_tensors(path: Path, tensors: Mapping[str, Any], **metadata: str) -> None:
    """Write arrays to a safetensors file as torch's loaders expect it.

    Non-contiguous arrays would be written wrongly and silently, so all are made contiguous.

    Args:
        metadata: Words for the file's header.
    """
    arrays = {name: np.ascontiguousarray(np.asarray(value)) for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt", **metadata})


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden path into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: cannot write: {error}") from error


def leftovers(directory: Path) -> list[Path]:
    """What a process that was killed has left of the files and directories it was writing."""
    return [path for path in directory.glob(".*") if re.fullmatch(_BESIDE, path.name)]


@functools.cache
def package_digest() -> str:
    """The SHA-256 of this package's sources, by which one program is known from another."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _beside(path: Path) -> Path:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    UNFINISHED.add(temporary)
    return temporary


_BESIDE = r"\..+\.[0-9a-f]{12}"


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
