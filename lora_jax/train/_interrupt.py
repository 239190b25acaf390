"""Ctrl-C and SIGTERM, taken between two steps."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that no step is cut in two.

    A second signal interrupts at once.  Outside the main thread Python lets nobody listen,
    and the event is never set.
    """
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("stopping after this step; once more stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
