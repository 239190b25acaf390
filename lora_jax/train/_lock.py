"""One process at a time in a run's directory."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .._errors import InputError
from .._files import reported

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, made if need be, against other processes.

    The kernel lets go of it when the process ends, however it ends; over NFS, once the server
    has missed a client that crashed.  A file system that knows no locks is not held.

    Raises:
        InputError: if another process holds it.
    """
    path = directory / LOCK_FILE
    with reported(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = _hold(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held, so that nobody holds what is no longer there
        file.close()


def _hold(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InputError(
                f"{path.parent}: another process is training here ({holder}); wait until it ends,"
                " or write to another directory with --output"
            ) from None
        except OSError:
            return file
        # Whoever held it may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            return file
        file.close()
