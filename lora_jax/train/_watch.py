"""Processes that train one run watch over each other: when one fails, all end and say why."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from .._errors import InputError, first_line

_END, _BEAT, _GONE, _HOST = "lora/end", "lora/beat/", "lora/gone/", "lora/host/"
_LONG = 24 * 3600 * 1000
"""Milliseconds: a wait that only the end of another process cuts short."""
_PATIENCE = 10
"""Heartbeats that a process may take for what it does alone while the others wait."""
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
"""Where JAX tells all processes that one has got SIGTERM."""
_alone: list[tuple[str, float]] = []
_stops_with_steps = threading.Event()


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Work of the main thread that waits for no other process, so that one stuck in it is to blame.

    Args:
        what: As in "has been {what} for an hour".

    Example:
        >>> with alone("reading its rows"):
        ...     rows = [1, 2]
    """
    _alone.append((what, time.monotonic()))
    try:
        yield
    finally:
        _alone.pop()


def leave_stops_to_steps() -> None:
    """From now on SIGTERM is seen to after a step, when there is something to save."""
    _stops_with_steps.set()


class Disagreement(InputError):
    """What all processes find wrong at once, since each sees what all have."""


class Watch:
    """What one process knows of the others, by the key-value store of JAX's coordinator.

    Each process says now and then that it lives, and reads which others do.  One that fails
    publishes why before it ends; one that falls silent is reported by those who notice.  The main
    thread may be stuck in a collective meanwhile, so a thread ends the process.

    Args:
        client: JAX's, connected.
        process: The number of this process.
        count: Of how many.
    """

    def __init__(self, client: Any, process: int, count: int) -> None:
        self.client, self.process, self.count = client, process, count
        client.key_value_set(f"{_HOST}{process}", socket.gethostname())
        client.wait_at_barrier("lora/hosts", _LONG)
        hosts = dict(client.key_value_dir_get(_HOST))
        self.names = [f"process {i} of {count} ({hosts[f'{_HOST}{i}']})" for i in range(count)]
        self._left, self._end_is_taken = threading.Event(), threading.Lock()
        self._limit, self._again = 0.0, ""
        self._answered, self._heard = 0.0, dict.fromkeys(range(count), 0.0)
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self, heartbeat: float, again: str) -> None:
        """Notice from now on who is silent; all processes have to come here.

        Args:
            heartbeat: Seconds within which a process that fell silent is to be noticed.
            again: The command that goes on with the run.
        """
        self.client.wait_at_barrier("lora/begin", _LONG)
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(self._heard, self._answered)
        # Noticed after eight tenths, told after at most two more.
        self._limit, self._again = 0.8 * heartbeat, again
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self) -> None:
        """Wait for all others to be done too; what happens to them after that is their own."""
        self.client.wait_at_barrier("lora/done", _LONG)
        self._left.set()

    def fail(self, error: BaseException) -> None:
        """End all processes because of an error of this one; does not return."""
        if _may_be_of_another(error):
            # Whoever is to blame is noticed soon, and this process ended with that.
            time.sleep(1.5 * self._limit / 0.8 + 1)
        cause, code = _told(error)
        self._take_end()
        found_by_all = isinstance(error, Disagreement)
        self._publish(cause if found_by_all else f"{self.names[self.process]}: {cause}", code)
        self._exit(cause, code)

    def lost(self) -> None:
        """Process 0 has gone: with a reason that is on its way, at the end of the run, or dead."""
        if not self._left.wait(1) and self._ending(0.1) is None:
            self._end(f"{self.names[0]} has died; {self._advice()}", 1, gone=0)

    def _listen(self) -> None:
        """End this process when there is a reason; never waits for long, whatever has died."""
        before = time.monotonic()
        while not self._left.is_set():
            ending = self._ending(self._limit / 10 or 1)
            if ending is not None:
                self._end(ending["cause"], ending["code"], ending["gone"])
            if not _stops_with_steps.is_set() and self._noticed():
                self._end("stopped before the first step; the same command starts again", 0)
            now = time.monotonic()
            if now - before > self._limit / 2:  # this process itself was stopped for a while
                self._answered, self._heard = now, dict.fromkeys(self._heard, now)
            before = now
            self._judge(now)

    def _ending(self, seconds: float) -> dict[str, Any] | None:
        try:
            return json.loads(self.client.blocking_key_value_get(_END, int(1000 * seconds)))
        except Exception:  # nothing yet, in one of the coordinator's many words
            self._left.wait(0.05)
            return None

    def _noticed(self) -> bool:
        """Whether a process has got SIGTERM."""
        try:
            return bool(self.client.key_value_try_get(_NOTICE))
        except Exception:  # there is no such key
            return False

    def _judge(self, now: float) -> None:
        if not self._limit:
            return
        if self.process and now - self._answered > self._limit:
            self._end(self._silent(0, now - self._answered), 1, gone=0)
        # Only the time in which the coordinator answered counts against another.
        for other, heard in self._heard.items():
            if other != self.process and self._answered - heard > self._limit:
                self._publish(self._silent(other, self._answered - heard), 1, gone=other)
                return

    def _silent(self, process: int, seconds: float) -> str:
        name = self.names[process]
        return f"{name} has not been heard of for {seconds:.0f} s; {self._advice()}"

    def _advice(self) -> str:
        return f"after it is restarted, {self._again} goes on"

    def _beat(self) -> None:
        beats: dict[str, str] = {}
        count = 0
        while not self._left.wait(self._limit / 10):
            count += 1
            with contextlib.suppress(Exception):  # silence is judged, not errors
                what, since = next(iter(_alone[:1]), ("", time.monotonic()))
                beat = json.dumps([count, what, time.monotonic() - since])
                self.client.key_value_set(f"{_BEAT}{self.process}", beat, True)
                found = dict(self.client.key_value_dir_get(_BEAT))
                now = time.monotonic()
                for key, value in found.items() - beats.items():
                    other = int(key.removeprefix(_BEAT))
                    self._heard[other] = now
                    self._judge_work(other, *json.loads(value)[1:])
                self._answered, beats = now, found

    def _judge_work(self, process: int, what: str, seconds: float) -> None:
        if seconds > _PATIENCE * self._limit / 0.8:
            stuck = f"{self.names[process]} has been {what} for {seconds:.0f} s"
            self._publish(f"{stuck}; {self._advice()}", 1)

    def _publish(self, cause: str, code: int, gone: int | None = None) -> None:
        """Tell all others; the first reason counts."""
        ending = json.dumps({"cause": cause, "code": code, "gone": gone})
        with contextlib.suppress(Exception):
            self.client.key_value_set(_END, ending)

    def _end(self, cause: str, code: int, gone: int | None = None) -> None:
        self._take_end()
        self._exit(cause, code, gone)

    def _take_end(self) -> None:
        """One thread ends the process, and gives one reason."""
        if not self._end_is_taken.acquire(blocking=False):
            threading.Event().wait()

    def _exit(self, cause: str, code: int, gone: int | None = None) -> None:
        """Print the reason and end, without the ways out that would wait for the others."""
        with contextlib.suppress(OSError):
            print(f"{'error: ' if code else ''}{cause}", file=sys.stderr, flush=True)
        farewell = threading.Thread(target=self._part, args=(gone,), daemon=True)
        farewell.start()
        farewell.join(5)
        os._exit(code)

    def _part(self, gone: int | None) -> None:
        """Process 0 holds the others' reason, so it goes last."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # may wait for whoever reads it, so here
            if gone == 0:
                return
            self.client.key_value_set(f"{_GONE}{self.process}", "")
            while self.process == 0:
                left = len(self.client.key_value_dir_get(_GONE)) + (gone is not None)
                if left >= self.count:
                    return
                time.sleep(0.05)


def _may_be_of_another(error: BaseException) -> bool:
    """Whether an error is what a collective shows when another process has died."""
    import jax

    full = "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and not full


def _told(error: BaseException) -> tuple[str, int]:
    """An error in a line, and what the process exits with."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        return str(error), error.code if isinstance(error.code, int) else 1
    traceback.print_exception(error)
    return (first_line(error) if isinstance(error, Exception) else type(error).__name__), 1
