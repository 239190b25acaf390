"""Train steps whose time and memory are compared, each in a process of its own.

`measured` runs in the script; the cases are built in the children that `experiments/bench` starts.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "bench"))

import machine  # noqa: E402
import measure  # noqa: E402
import outcome  # noqa: E402
from stats import ratio, spread  # noqa: E402
from workloads import MAIN, SMALL, Entry, Workload  # noqa: E402

THREADS = 2
METRICS = ("wall", "cpu", "peak_step", "peak_life", "temp_bytes", "argument_bytes")


def measured(
    labels: Mapping[str, str], over: Callable[[str], str], rounds: int, quick: bool
) -> dict[str, Any]:
    """Seconds and bytes of a train step, by case, taken in turns.

    Args:
        labels: The cases, such as `full/nothing` or `r8/dots`, and what they are called; those that
            train the same have to have the same losses.
        over: The case by whose time a case's is divided, round by round.
        rounds: How many turns.
        quick: A tiny shape instead of that of `experiments/bench`.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    entries = tuple(Entry(k, "costs", k, label, k.split("/")[0]) for k, label in labels.items())
    spec = SMALL if quick else MAIN
    workload = Workload("claims", "", "stepwise", spec, spec, entries, ())
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    run = measure.Run(workload, dict(spec), rounds, threads)
    before = machine.wait_for_quiet(0.0 if quick else 120.0)
    samples = measure.stepwise(run)
    shown: dict[str, Any] = {}
    for key, own in samples.items():
        shown[labels[key]] = {metric: spread(own[metric]) for metric in METRICS}
        shown[labels[key]]["over"] = ratio(own["wall"], samples[over(key)]["wall"])
    others = run.notes["others"]
    quiet = before["quiet"] and others <= machine.QUIET_SHARE
    return {"shape": spec, "threads": threads, "quiet": quiet, "others": others, "cases": shown}


def cost_table(found: Mapping[str, Any]) -> str:
    """Seconds, their quotients with quartiles, and bytes."""
    rows = []
    for label, own in found["cases"].items():
        over = own["over"]
        mb = (
            f"{own[m]['median'] / 1e6:,.0f}" for m in ("temp_bytes", "argument_bytes", "peak_step")
        )
        time = f"{over['median']:.2f} ({over['q1']:.2f}..{over['q3']:.2f})"
        rows.append([label, f"{own['wall']['median']:.3f}", time, *mb])
    head = ["step", "seconds", "ratio", "temporaries, MB", "arguments, MB", "peak RSS, MB"]
    quiet = "" if found["quiet"] else "\nNOT QUIET: others used this machine meanwhile.\n"
    return quiet + outcome.markdown(head, rows)


def said(found: Mapping[str, Any]) -> str:
    """The summary's words: each case's time and memory over those of the first."""
    first, *others = found["cases"]

    def compiled(name: str) -> float:
        own = found["cases"][name]
        return own["temp_bytes"]["median"] + own["argument_bytes"]["median"]

    return "; ".join(
        f"{name}: ×{found['cases'][name]['over']['median']:.2f} in time,"
        f" ×{compiled(name) / compiled(first):.2f} in memory by the compiler's account"
        for name in others
    )


def full(spec: dict[str, Any], kept: str) -> Any:
    """Every parameter trained."""
    from cases_jax import adamw, library_step, load

    model, _, ids = load(spec, remat=kept)
    return library_step(model, {}, model.params, adamw(frozen_leaves=False), ids)


def lora(spec: dict[str, Any], rank: int, kept: str) -> Any:
    """An adapter of some rank trained; its B is not zero."""
    import jax
    from cases_jax import LAYOUTS, adamw, library_step, load, lora_config

    from lora_jax import init_adapter

    model, _, ids = load(spec, remat=kept)
    config = lora_config(spec | {"rank": rank, "alpha": 2 * rank})
    adapter = init_adapter(jax.random.key(0), model.params, config, layouts=LAYOUTS)
    return library_step(model, model.params, adapter, adamw(), ids)


def cases(ranks: Sequence[int], policies: Sequence[str]) -> dict[str, Any]:
    """By name, such as `full/nothing` and `r8/dots`."""
    made: dict[str, Any] = {}
    for kept in policies:
        made[f"full/{kept}"] = functools.partial(full, kept=kept)
        for rank in ranks:
            made[f"r{rank}/{kept}"] = functools.partial(lora, rank=rank, kept=kept)
    return made


CASES = cases((2, 8, 64), ("everything", "nothing", "dots", "names"))
