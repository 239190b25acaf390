"""Ctrl-C and SIGTERM: an end in order, with a line that says how to go on."""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOPPING = "stopping after this step; Ctrl-C from now on stops at once"


UNFINISHED: set[Path] = set()
"""Files and directories that are half written: they go where a signal ends the process."""


class Stopped(SystemExit):
    """A signal asked for an end.

    The message says what was saved and how to go on.  Uncaught, it ends the process with `code`: 0
    after SIGTERM, since a machine that is taken away is no failure, and 130 after Ctrl-C.  It is
    `in_order` unless something was cut off.
    """

    def __init__(self, message: str, code: int = 0, *, in_order: bool = True) -> None:
        super().__init__(message)
        self.code, self.in_order = code, in_order


class StopRequest(threading.Event):
    """Set by SIGINT or SIGTERM."""

    code = 0
    """What the process is to exit with."""


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """An event that SIGINT or SIGTERM sets, so that no step is cut in two.

    Ctrl-C after that interrupts at once; SIGTERM does not, since schedulers repeat it.  Outside
    the main thread Python lets nobody listen, and the event is never set.
    """
    asked = StopRequest()

    def handle(number: int, frame: Any) -> None:
        if not asked.is_set():
            asked.code = _code(number)
            asked.set()
            with contextlib.suppress(RuntimeError):  # in the midst of another write
                print(STOPPING, file=sys.stderr)
        elif number == signal.SIGINT:
            asked.code = _code(number)
            raise KeyboardInterrupt

    with _handled(handle):
        yield asked


@contextlib.contextmanager
def stops_at_once(message: str, *, after_sigterm: int = 0) -> Iterator[None]:
    """Where no step has to be ended, SIGINT or SIGTERM ends the process with this line.

    Files that are half written go.

    Args:
        message: What is kept, and how to go on.
        after_sigterm: The exit code then: 0 where the same command goes on.
    """

    def handle(number: int, frame: Any) -> None:
        # An exception would be lost where it meets a callback, of the garbage collector say, and
        # crash the process within the import of a library that is not made for it.
        try:
            for path in tuple(UNFINISHED):
                remove(path)
            with contextlib.suppress(RuntimeError, OSError):
                _leave_bar()
                sys.stdout.flush()
            os.write(2, f"{message}\n".encode())
        finally:
            os._exit(after_sigterm if number == signal.SIGTERM else 128 + number)

    with _handled(handle):
        yield


def remove(path: Path) -> None:
    """Remove what is unfinished, or was; what became whole is no longer there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    UNFINISHED.discard(path)


def _leave_bar() -> None:
    """Clear the line of a bar that moves, and show the cursor that it hid."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        sys.stdout.write("\r\x1b[K\x1b[?25h")


def _code(number: int) -> int:
    return 0 if number == signal.SIGTERM else 128 + number


@contextlib.contextmanager
def _handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
