"""What a claim comes to: spreads over seeds, files of results, pictures, tables."""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax._drawing import save_figure

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Spread:
    """What several seeds came to."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}..{self.high:.3f})"

    def ties(self, other: "Spread") -> bool:
        """Whether the ranges of the seeds overlap."""
        return self.low <= other.high and other.low <= self.high


def spread(records: Sequence[Mapping[str, Any]], arm: str, part: str, what: str = "loss") -> Spread:
    """Over the seeds of an arm: its `loss` or `exact` on a part of the test rows."""
    return Spread.of([r[part][what] for r in records if r["arm"] == arm])


def options(description: str, **switches: str) -> argparse.Namespace:
    """`--quick` runs the script to its end on next to nothing; `--out` is where results go.

    Args:
        switches: Options of its own that are on or off, and what each does.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--quick", action="store_true", help="a tiny version, for tests")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results and pictures")
    return parser.parse_args()


def conditions(begun: float) -> dict[str, Any]:
    """Where and when the numbers were made; `begun` by `time.perf_counter`."""
    return {
        "hardware": f"{platform.machine()} {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "usable_cores": len(os.sched_getaffinity(0)),
        "shared": "losses were computed beside other work; times and memory, on a quiet machine",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - begun),
        "processor_seconds": round(sum(os.times()[:4])),
    }


def save_results(out: Path, name: str, results: Mapping[str, Any], begun: float) -> None:
    """Write `results/NAME.json`; numbers that are none become null."""
    path = out / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain({"conditions": conditions(begun), **results}), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def load_results(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "results" / f"{name}.json").read_text("utf-8"))


def save_picture(out: Path, name: str, figure: Any) -> None:
    """Write `pictures/NAME.png`."""
    path = out / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, figure.axes, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def chosen_rate(rate: float, edge: bool) -> str:
    """A learning rate that was chosen, and whether it lies at an end of what was tried."""
    return f"{rate:g}" + (" (end of the grid)" if edge else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [list(header), ["---"] * len(header), *([str(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
