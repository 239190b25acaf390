"""What a run reports: one JSON line a record, TensorBoard, and a listener."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .._files import atomic_file
from ._hosts import is_first

Listener = Callable[[dict[str, Any]], None]
"""Whoever watches a run: called with every record of `metrics.jsonl`."""


class MetricsLog:
    """Appends records to `metrics.jsonl` (and TensorBoard files), a line at a time.

    Args:
        directory: The run's.
        tensorboard: Whether to write TensorBoard's files too.
        resumed_from: The step of the checkpoint a run goes on from: later records are dropped,
            since the steps will write them again.  None starts anew.
    """

    def __init__(
        self, directory: Path, *, tensorboard: bool, resumed_from: int | None = None
    ) -> None:
        path = directory / "metrics.jsonl"
        if path.exists():
            until = -1 if resumed_from is None else resumed_from
            lines = path.read_text("utf-8", errors="replace").splitlines()
            with atomic_file(path) as temporary:
                kept = [f"{line}\n" for line in lines if _step_of(line) <= until]
                temporary.write_text("".join(kept), "utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = None
        if tensorboard:
            self._events = _Events(directory / "tensorboard", resumed_from)

    def __call__(self, record: dict[str, Any]) -> None:
        # JSON knows neither infinity nor NaN: a gradient that overflowed is null.
        finite = {k: None if _overflowed(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(finite)

    def close(self) -> None:
        """Close the files; what a full disk did not take was reported when it was written."""
        for file in (self._file, self._events):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


class _Events:
    """TensorBoard's file, written at once rather than by a thread whose errors nobody sees."""

    def __init__(self, directory: Path, resumed_from: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        directory.mkdir(exist_ok=True)
        self._event: Any = event_pb2.Event  # type: ignore[attr-defined]
        self._scalar = scalar
        self._writer = EventsWriter(str(directory / "events"))
        if resumed_from is not None:  # later steps of the file before are no longer true
            log: Any = event_pb2.SessionLog  # type: ignore[attr-defined]
            start = log(status=log.START)
            self._add(resumed_from + 1, session_log=start)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._add(record["step"], summary=self._scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))


def notice(line: str) -> None:
    """Tell whoever waits for the run, beside its results; one process speaks for all."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def peak_memory() -> int:
    """Bytes: the device's peak where it counts, else the process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _step_of(line: str) -> int:
    """A last line that was cut off when the process died counts as later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def _overflowed(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
