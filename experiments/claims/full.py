"""LoRA against full fine-tuning: held-out loss, what is trained and saved; time and memory.

    python experiments/claims/full.py            # losses and files
    python experiments/claims/full.py --costs    # seconds and bytes of a step, on a quiet machine

Hu et al. 2021 say that LoRA is on par with full fine-tuning or better, at a third of the memory and
a ten-thousandth of the checkpoint.  Two tasks: one far from what the base knows (Shakespeare, for a
base of children's stories) and one near it (docstrings, for a base of Python source).
"""

import argparse
import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import outcome
from common import TUNING_SEED, Arm, Base, Params, Task, adapter_mask, pairs, shares
from outcome import Spread
from tasks import style_task

from lora_jax import InputError, LoraConfig, combine
from lora_jax._drawing import BLUE, VERMILION
from lora_jax.adapters import save_adapter
from lora_jax.data import Examples, docstring_rows, eval_batches
from lora_jax.models import save_pretrained
from lora_jax.train import evaluate, make_eval_step

RANKS = (2, 8, 32)
FULL = "full"
LORA_RATES = {"style": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "docstrings": (3e-4, 1e-3, 3e-3, 1e-2)}
FULL_RATES = {"style": (3e-4, 1e-3, 3e-3, 1e-2), "docstrings": (1e-4, 3e-4, 1e-3, 3e-3)}
TITLES = {"style": "Shakespeare, from stories", "docstrings": "docstrings, from Python source"}
SEEDS = range(3)


def main() -> None:
    options = outcome.options(__doc__ or "", costs="time and memory alone")
    begun = time.perf_counter()
    if options.costs:
        return costs(options, begun)
    tasks = [far(options.quick)] if options.quick else [far(False), near()]
    results: dict[str, Any] = {"tried": [], "runs": []}
    for base, task in tasks:
        tried, runs = measured(base, task, options.quick)
        results["tried"] += tried
        results["runs"] += runs
    results["files"] = files(common.load_base("bundled"))
    results["before"] = {t.name: held_out(b, t, [{}], t.test["test"])[0] for b, t in tasks}
    outcome.save_results(options.out, "full", results, begun)
    outcome.save_picture(options.out, "full", picture(results))
    print(table(results))


def far(quick: bool) -> tuple[Base, Task]:
    """Shakespeare for the base of children's stories."""
    base = common.load_base("stories")
    task = style_task(base, 4 if quick else 150)
    test = task.test["held-out plays"]
    return base, small(dataclasses.replace(task, batch_size=4, test={"test": test}), quick)


def near() -> tuple[Base, Task]:
    """What functions do, for the base of Python source; measured on modules it has never seen."""
    base = common.load_base("bundled")
    train, held_out = (
        pairs(base, [(f"{row['instruction']}\n{row['input']}\n", row["output"]) for row in rows])
        for rows in (docstring_rows(False, max_source=250), docstring_rows(True, max_source=250))
    )
    train, held_out = (
        dataclasses.replace(x, examples=tuple(e for e in x.examples if len(e) <= 128))
        for x in (train, held_out)
    )
    valid, test = shares(held_out.examples, 100)
    valid, test = (dataclasses.replace(held_out, examples=tuple(x)) for x in (valid, test))
    return base, Task("docstrings", train, valid, {"test": test}, steps=60, batch_size=4)


def small(task: Task, quick: bool) -> Task:
    """A task with next to no held-out rows, if it is only tried out."""
    if not quick:
        return task

    def few(examples: Examples) -> Examples:
        return dataclasses.replace(examples, examples=examples.examples[:4])

    test = {name: few(part) for name, part in task.test.items()}
    return dataclasses.replace(task, batch_size=1, valid=few(task.valid), test=test)


Run = tuple[Arm, float, int]
"""What is trained, its learning rate and its seed."""


def arms(base: Base, ranks: Sequence[int]) -> list[Arm]:
    return [Arm(f"LoRA r {rank}", base.lora(rank, 2 * rank)) for rank in ranks]


def measured(base: Base, task: Task, quick: bool) -> tuple[list[Any], list[Any]]:
    """The runs that chose each arm's learning rate, and those that are reported."""
    ends, tried, runs = (task.steps,), [], []
    groups = [
        (arms(base, RANKS), LORA_RATES[task.name]),
        ([Arm(FULL, LoraConfig())], FULL_RATES[task.name]),
    ]
    for group, rates in groups:
        rates = rates[:1] if quick else rates
        for rate in rates:  # one program serves all rates, and then all seeds
            own = [(arm, rate, TUNING_SEED) for arm in group]
            tried += trained(base, task, own, ends, {"valid": task.valid})
        best = {arm.name: best_rate(tried, task.name, arm.name) for arm in group}
        for seed in SEEDS[:1] if quick else SEEDS:
            own = [(arm, best[arm.name], seed) for arm in group]
            for record in trained(base, task, own, ends, task.test):
                runs.append(record | {"edge": record["rate"] in (rates[0], rates[-1])})
    return tried, runs


def best_rate(tried: Sequence[Any], task: str, arm: str) -> float:
    """The learning rate of the lowest validation loss at the end."""
    own = [x for x in tried if x["task"] == task and x["arm"] == arm]
    return min(own, key=lambda x: x["looks"][-1]["valid"])["rate"]


def trained(
    base: Base,
    task: Task,
    runs: Sequence[Run],
    looks: Sequence[int],
    parts: Mapping[str, Examples],
) -> list[dict[str, Any]]:
    """Train runs of one kind in one step each: all LoRA, or all full; a record for each.

    Full fine-tuning is an adapter that holds every parameter, over a base that holds none.
    """
    begun = time.process_time()
    full = runs[0][0].name == FULL
    own = dataclasses.replace(base, params={}) if full else base
    starts = [base.params if full else base.adapter(arm.lora, seed) for arm, _, seed in runs]
    records: list[dict[str, Any]] = [
        {"task": task.name, "arm": arm.name, "rate": rate, "seed": seed, "looks": []}
        for arm, rate, seed in runs
    ]

    def look(step: int, adapters: list[Params]) -> None:
        losses = {name: held_out(own, task, adapters, part) for name, part in parts.items()}
        for i, record in enumerate(records):
            record["looks"].append({"step": step, **{k: x[i] for k, x in losses.items()}})

    _, rates, seeds = zip(*runs, strict=True)
    common.train_together(
        own,
        task,
        starts,
        rates,
        seeds,
        mask=everything if full else adapter_mask,
        looks=looks,
        look=look,
    )
    numbers = common.trained if not full else count
    for record, start in zip(records, starts, strict=True):
        record["trainable"] = numbers(start)
    print(f"{task.name}: {len(runs)} runs, {time.process_time() - begun:.0f} s", flush=True)
    return records


def everything(params: Params) -> Params:
    return jax.tree.map(lambda _: True, params)


def count(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def held_out(base: Base, task: Task, adapters: Sequence[Params], examples: Examples) -> list[float]:
    """Nats per trained token of each adapter; infinite once it has diverged."""
    step = make_eval_step(base.model)
    sizes = {**task.sizes, "batch_size": 16}
    batches = list(eval_batches(examples, **sizes))

    def loss(adapter: Params) -> float:
        try:
            return evaluate(step, combine(base.params, adapter), batches).loss
        except InputError:
            return math.inf

    return [loss(adapter) for adapter in adapters]


def files(base: Base) -> dict[str, int]:
    """Bytes on disk of the bundled base, and of an adapter of each rank, both in float32."""
    sizes = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        save_pretrained(model, base.params, base.pretrained.config, dtype="float32")
        sizes[FULL] = weights(model)
        for arm in arms(base, RANKS):
            folder, adapter = Path(directory, arm.name), base.adapter(arm.lora, 0)
            save_adapter(folder, adapter, arm.lora, layouts=base.pretrained.layouts)
            sizes[arm.name] = weights(folder)
    return sizes


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def losses(results: dict[str, Any], task: str, arm: str) -> Spread:
    own = [x for x in results["runs"] if x["task"] == task and x["arm"] == arm]
    return Spread.of([x["looks"][-1]["test"] for x in own])


def names(results: dict[str, Any], what: str) -> list[str]:
    return list(dict.fromkeys(x[what] for x in results["runs"]))


def table(results: dict[str, Any]) -> str:
    rows = []
    for task in names(results, "task"):
        whole = losses(results, task, FULL)
        rows.append([task, "none", 0, "", f"{results['before'][task]:.3f}", "", ""])
        for arm in names(results, "arm"):
            run = next(x for x in results["runs"] if x["task"] == task and x["arm"] == arm)
            own = losses(results, task, arm)
            against = "tie" if own.ties(whole) else f"{own.mean - whole.mean:+.3f}"
            size = results["files"][arm] / 1e6
            on_disk = f"{size:.2f}" if task == "docstrings" else ""
            rate = outcome.chosen_rate(run["rate"], run["edge"])
            against = "" if arm == FULL else against
            rows.append([task, arm, f"{run['trainable']:,}", rate, own, against, on_disk])
    head = ["task", "trained", "parameters", "rate", "held-out loss", "against full", "file, MB"]
    return outcome.markdown(head, rows)


def said(results: dict[str, Any]) -> str:
    """The summary's words."""
    parts = []
    for task in names(results, "task"):
        largest, whole = losses(results, task, f"LoRA r {RANKS[-1]}"), losses(results, task, FULL)
        off = "a tie" if largest.ties(whole) else f"{largest.mean - whole.mean:+.2f} nats"
        parts.append(f"{TITLES[task]}: {off} at rank {RANKS[-1]}")
    return "; ".join(parts)


def picture(results: dict[str, Any]) -> Any:
    """Held-out loss over what is trained."""
    from matplotlib.figure import Figure

    tasks = names(results, "task")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for arm in names(results, "arm"):
            own = losses(results, task, arm)
            size = next(
                x["trainable"] for x in results["runs"] if x["task"] == task and x["arm"] == arm
            )
            off = np.array([[own.mean - own.low], [own.high - own.mean]])
            colour = VERMILION if arm == FULL else BLUE
            axes.errorbar(size, own.mean, off, fmt="o", color=colour, capsize=3)
            place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
            axes.annotate(arm, (size, own.high), **place)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.2)
        axes.set(
            title=TITLES[task], xlabel="trained parameters", ylabel="held-out loss (nats per token)"
        )
    return figure


def costs(options: argparse.Namespace, begun: float) -> None:
    """Seconds and bytes of a step of `experiments/bench`'s shape, each case in its own process."""
    from costs import cost_table, measured

    cases = {"full/everything": FULL, "r8/everything": "LoRA r 8", "r64/everything": "LoRA r 64"}
    cases = dict(list(cases.items())[:2]) if options.quick else cases
    rounds = 2 if options.quick else 12
    found = measured(cases, lambda case: "full/everything", rounds, options.quick)
    outcome.save_results(options.out, "full_costs", found, begun)
    print(cost_table(found))


if __name__ == "__main__":
    main()
