"""The four ways of measuring: each returns, for every case, lists of figures by metric."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from child import CaseError, Child
from stats import Samples, disagreement, rotated
from workloads import Entry, Workload

TOLERANCE = 1e-3
"""Relative difference of losses above which cases do not do the same work."""
PAUSE = 0.05
"""Seconds between steps, in which threads that spin go to sleep."""


class GateError(Exception):
    """The cases do not compute the same: their times say nothing."""


class Run:
    """What one measurement is made with, and what it notes beside the figures."""

    def __init__(self, workload: Workload, spec: dict[str, Any], rounds: int, threads: int):
        self.workload, self.spec = workload, spec
        self.rounds, self.threads = rounds, threads
        self.left_out: dict[str, str] = {}
        self.notes: dict[str, Any] = {}

    def child(self, entry: Entry, **more: Any) -> Child:
        return Child(entry.module, entry.case, self.spec | {"env": entry.env} | more, self.threads)

    def leave_out(self, entry: Entry, error: CaseError) -> None:
        """A peer that does not run is told of; our own case stops everything."""
        if not entry.peer:
            raise error
        self.left_out[entry.key] = str(error)
        say(f"left out: {entry.label}: {error}")


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def directory_for(run: Run) -> Iterator[None]:
    """Weights, adapter and tokens on disk while the workload runs."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        run.spec = run.spec | {"dir": directory}
        if "shape" in run.spec:
            prepare = Child("cases_jax", "prepare", run.spec, run.threads)
            try:
                prepare.ask("build", gate=0)
            finally:
                prepare.close()
        yield


def stepwise(run: Run) -> Samples:
    """One step of every case per round, in an order that rotates."""
    children: dict[str, Child] = {}
    with directory_for(run), contextlib.ExitStack() as stack:
        facts: dict[str, dict[str, Any]] = {}
        for entry in run.workload.entries:
            child = run.child(entry)
            stack.callback(child.close)
            try:
                facts[entry.key] = child.ask("build", gate=entry.gate)
                children[entry.key] = child
                say(f"built: {entry.label}")
            except CaseError as error:
                child.close()
                run.leave_out(entry, error)
        check(run, facts)
        samples: Samples = {key: {"wall": [], "cpu": []} for key in children}
        with watched(run, [child.pid for child in children.values()]) as spent:
            for turn in range(-1, run.rounds):  # the first round warms up
                for key in rotated(list(children), max(turn, 0)):
                    time.sleep(PAUSE)
                    wall, cpu = children[key].ask("step")
                    spent.append(cpu)
                    if turn >= 0:
                        samples[key]["wall"].append(wall)
                        samples[key]["cpu"].append(cpu)
        for key, child in children.items():
            note_memory(samples[key], child.ask("memory"), facts[key]["facts"])
    return samples


def check(run: Run, built: dict[str, dict[str, Any]], tolerance: float = TOLERANCE) -> None:
    """Stop unless every group's losses agree, and each quantized one with its dense reference."""
    run.notes["gate"] = {
        key: {"losses": x["losses"], "reference": x["reference"]} for key, x in built.items()
    }
    groups: dict[str, dict[str, list[float]]] = {}
    for entry in run.workload.entries:
        if entry.key not in built:
            continue
        losses, reference = built[entry.key]["losses"], built[entry.key]["reference"]
        if reference is not None:
            own = {"dequantized reference": [reference], entry.label: losses}
            refuse(disagreement(own, tolerance), tolerance)
        groups.setdefault(entry.group or entry.key, {})[entry.label] = losses
    for losses in groups.values():
        longest_first = dict(sorted(losses.items(), key=lambda item: -len(item[1])))
        refuse(disagreement(longest_first, tolerance), tolerance)
    say("gate passed: " + ", ".join(f"{k} {x['losses'][0]:.6f}" for k, x in built.items()))


def refuse(difference: str | None, tolerance: float) -> None:
    if difference:
        raise GateError(f"not the same work: {difference} (tolerance {tolerance:g})")


@contextlib.contextmanager
def watched(run: Run, pids: list[int]) -> Iterator[list[float]]:
    """Note what others, and our own children between their steps, used of the processors.

    The list takes the processor seconds of each step.
    """
    spent: list[float] = []

    def read() -> tuple[float, float, float]:
        children = sum(machine.process_seconds(pid) for pid in pids)
        own = children + machine.process_seconds("self")
        return time.monotonic(), children, machine.busy_seconds() - own

    before = read()
    yield spent
    after = read()
    wall, children, others = (b - a for a, b in zip(before, after, strict=True))
    cores = machine.os.cpu_count() or 1
    run.notes["others"] = round(max(others, 0.0) / wall / cores, 4)
    run.notes["between_steps"] = round(max(children - sum(spent), 0.0) / wall / cores, 4)


def note_memory(samples: dict[str, list[float]], memory: dict, facts: dict) -> None:
    """Peaks of a process, and what the compiler knows of its step."""
    samples["peak_step"], samples["peak_life"] = [memory["step"]], [memory["life"]]
    samples["resident"] = [memory["resident"]]
    for name in ("trace_s", "compile_s", "temp_bytes", "argument_bytes"):
        if name in facts:
            samples[name] = [facts[name]]


def resident(run: Run) -> Samples:
    """Peak memory of every case in fresh processes, one at a time."""
    samples: Samples = {}
    entries = {entry.key: entry for entry in run.workload.entries}
    with directory_for(run):
        for turn in range(run.rounds):
            built: dict[str, dict[str, Any]] = {}
            for key in rotated(list(entries), turn):
                entry = entries[key]
                if key in run.left_out:
                    continue
                child = run.child(entry)
                try:
                    built[key] = child.ask("build", gate=2)
                    memory = child.ask("memory")
                except CaseError as error:
                    run.leave_out(entry, error)
                    continue
                finally:
                    child.close()
                into = samples.setdefault(key, {})
                for metric, name in (("peak_step", "step"), ("peak_life", "life"),
                                     ("resident", "resident")):  # fmt: skip
                    into.setdefault(metric, []).append(memory[name])
            check(run, built)
    return {key: x for key, x in samples.items() if key not in run.left_out}


def compilation(run: Run) -> Samples:
    """Each depth in a fresh process with an empty cache, then in another with what that left."""
    entries = {entry.key: entry for entry in run.workload.entries}
    samples: Samples = {key: {"trace_s": [], "compile_s": [], "total_s": []} for key in entries}
    for turn in range(run.rounds):
        for key in rotated(["L4", "L64"], turn):
            with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
                for name in (key, f"{key}_warm"):
                    facts = compiled(run, entries[name], int(key[1:]), cache=cache)
                    facts["total_s"] = facts["trace_s"] + facts["compile_s"]
                    for metric in samples[name]:
                        samples[name][metric].append(facts[metric])
                if not any(Path(cache).iterdir()):
                    raise GateError("the compiler left nothing in its cache")
    return samples


def compiled(run: Run, entry: Entry, layers: int, **more: Any) -> dict[str, Any]:
    """Facts about the step of so many layers, compiled in a fresh process."""
    shape = run.spec["shape"] | {"num_hidden_layers": layers}
    child = run.child(entry, shape=shape, **more)
    try:
        return child.ask("build", gate=0)["facts"]
    finally:
        child.close()


def slope(run: Run) -> Samples:
    """(temp[32] - temp[16] - 16 layers' adapter gradients) / (16 carries), rematerialized."""
    samples: Samples = {}
    for entry in run.workload.entries:
        few, many = (
            compiled(run, entry, layers, remat=True, quant=entry.key == "nf4")
            for layers in (16, 32)
        )
        gradients = many["adapter_bytes"] - few["adapter_bytes"]
        grown = many["temp_bytes"] - few["temp_bytes"]
        samples[entry.key] = {
            "carries": [(grown - gradients) / (16 * many["carry_bytes"])],
            "temp_bytes": [many["temp_bytes"]],
        }
        run.notes[entry.key] = {"temp_16": few["temp_bytes"], "temp_32": many["temp_bytes"],
                                "adapter_gradients": gradients,
                                "carry": many["carry_bytes"]}  # fmt: skip
    return samples


KINDS = {
    "stepwise": stepwise,
    "resident": resident,
    "compilation": compilation,
    "slope": slope,
}
