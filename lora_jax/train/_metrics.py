"""What a run reports: one JSON line a record, TensorBoard, and a listener."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .._files import atomic_file

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
            lines = path.read_text("utf-8").splitlines()
            with atomic_file(path) as temporary:
                kept = [f"{line}\n" for line in lines if _step_of(line) <= until]
                temporary.write_text("".join(kept), "utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = None if resumed_from is None else resumed_from + 1
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def __call__(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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
    except (ValueError, KeyError):
        return sys.maxsize
