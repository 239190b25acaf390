"""How lora_jax stands against its peers on the same work, on this machine's processors.

    python experiments/bench/run.py [workload ...] [--rounds N] [--small] [--threads 2]

Every workload is held to the same losses before it is timed.  Results go to `results/`, those
of `--small` (tiny shapes, to try the suite) to `runs/bench/`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import machine
import measure
import plot
import table
from stats import spread
from workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
RESULTS, TRIALS = HERE / "results", HERE.parents[1] / "runs" / "bench"


def main() -> int:
    options = arguments()
    out = options.out or (TRIALS if options.small else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.workloads or list(WORKLOADS):
        try:
            result = measured(WORKLOADS[name], options)
        except (measure.GateError, measure.CaseError) as error:
            print(f"{name}: stopped: {error}", file=sys.stderr)
            failed += 1
            continue
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot.draw(result, out / f"{name}.png")
        told(result)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lora_jax against its peers, on the CPU.")
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="timed rounds (default: the workload's own)")
    parser.add_argument("--threads", type=int, default=2, help="for XLA and for torch")
    parser.add_argument("--small", action="store_true", help="tiny shapes, 3 rounds: a trial")
    parser.add_argument("--settle", type=float, default=120.0, help="seconds to wait for quiet")
    parser.add_argument("--out", type=Path, help="where results are written")
    options = parser.parse_args()
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if not 1 <= options.threads <= len(machine.os.sched_getaffinity(0)):
        parser.error(f"--threads must be in 1..{len(machine.os.sched_getaffinity(0))} here")
    return options


def measured(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known about one workload, as its JSON holds it."""
    print(f"\n{workload.name}: {workload.title}", flush=True)
    rounds = options.rounds or (min(workload.rounds, 3) if options.small else workload.rounds)
    spec = workload.small if options.small else workload.spec
    run = measure.Run(workload, dict(spec), rounds, options.threads)
    before = machine.wait_for_quiet(0.0 if options.small else options.settle)
    samples = measure.KINDS[workload.kind](run)
    return result_of(run, samples, before, options.small)


def told(result: dict[str, Any]) -> None:
    """The table of one workload, and whether it may be believed."""
    if not result["quiet"]:
        print("NOT QUIET: others used this machine; these figures are not to be published")
    print(table.of_result(result), flush=True)


def result_of(
    run: measure.Run, samples: measure.Samples, before: dict[str, Any], small: bool
) -> dict[str, Any]:
    """Figures, rows, and under which conditions they were measured."""
    workload = run.workload
    quiet = before.pop("quiet") and run.notes.get("others", 0.0) <= machine.QUIET_SHARE
    labels = {entry.key: entry.label for entry in workload.entries}
    return {
        "workload": workload.name,
        "title": workload.title,
        "small": small,
        "rounds": run.rounds,
        "threads": run.threads,
        **machine.describe(),
        "shape": {name: x for name, x in run.spec.items() if name not in ("dir", "env")},
        "quiet": quiet,
        "load": before,
        "notes": run.notes,
        "left_out": run.left_out,
        "shown": workload.shown,
        "cases": {
            key: {
                "label": labels[key],
                "figures": {metric: spread(values) for metric, values in metrics.items()},
                "samples": metrics,
            }
            for key, metrics in samples.items()
        },
        "rows": [table.row_of(row, samples) for row in workload.rows],
    }


if __name__ == "__main__":
    sys.exit(main())
