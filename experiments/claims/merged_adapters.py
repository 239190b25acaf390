"""Three adapters on one base: what a bank keeps of them, and what one merged adapter does.

    LORA_JAX_TEST_DATA=… python experiments/claims/merged_adapters.py [--quick]

Adapters for plays, for Python and for sums, each trained by itself.  A bank gives each row of a
batch its own; `weighted_adapter` makes one of the three, by each of its rules; and one adapter is
trained on the rows of all three.  A gain is what a loss falls by from the base's.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from common import (
    TUNING_SEED,
    Base,
    Params,
    Task,
    base_score,
    data_path,
    load_base,
    row_sums,
    score,
    tiny,
    train_together,
)
from outcome import Spread, markdown, options, save_picture, save_results
from tasks import style_task, text_task

from lora_jax import LoraConfig
from lora_jax._drawing import APART, GREY
from lora_jax.adapters import AdapterBank, weighted_adapter
from lora_jax.data import eval_batches, is_held_out, stdlib_modules

RANK = 8
RATES = (2e-3, 5e-3, 1.25e-2)
SEEDS = (0, 1, 2)
STEPS = 100
SHARES = (1 / 3, 0.6, 1.0)
"""Weights that each of the three may get, all the same one; validation rows choose."""
RULES: dict[Any, dict[str, Any]] = {
    "cat": {},
    "svd": {"svd_rank": RANK},
    "linear": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "svd_rank": 3 * RANK},
    "dare_linear": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
}
Losses = dict[str, float]


def main() -> None:
    given = options("Three adapters in a bank, merged, and one trained for all.")
    begun = time.perf_counter()
    base = load_base("stories")
    tasks = three_tasks(base)
    rates, seeds, rules = (RATES, SEEDS, list(RULES))
    if given.quick:
        tasks = [tiny(task) for task in tasks]
        rates, seeds, rules = RATES[1:2], SEEDS[:1], rules[:2]
    before = {task.name: base_score(base, part_of(task)).loss for task in tasks}
    alone, found = {}, {"before": before, "rates": {}}
    for number, task in enumerate(tasks):
        ((rate, alone[task.name]),) = tuned(base, task, [RANK], rates, seeds, first=100 * number)
        found["rates"][task.name] = rate
    joint = {}
    ranks = [RANK, 3 * RANK]
    for rank, own in zip(ranks, tuned(base, one_task(tasks), ranks, rates, seeds), strict=True):
        name = f"trained on all, r {rank}"
        found["rates"][name], joint[name] = own
    runs = []
    for i, seed in enumerate(seeds):
        adapters = {name: own[i] for name, own in alone.items()}
        trained = {name: own[i] for name, own in joint.items()}
        runs.append({"seed": seed, **one_seed(base, tasks, adapters, trained, rules)})
        print(f"seed {seed} merged", flush=True)
    found |= {"runs": runs, "tokens_of_each": STEPS * tasks[0].batch_size * tasks[0].length}
    found["kept"] = kept(found)
    save_results(given.out, "merged_adapters", found, begun)
    save_picture(given.out, "merged_adapters", picture(found))
    print(table(found))


def three_tasks(base: Base) -> list[Task]:
    modules = list(stdlib_modules())
    read, held_out = (
        "\n\n".join(code for name, code in modules if is_held_out(name) == held)
        for held in (False, True)
    )
    sums = [
        "\n\n".join(
            f"{row['question']}\n{row['answer']}"
            for row in map(json.loads, data_path(f"gsm8k/{part}.jsonl").open(encoding="utf-8"))
        )
        for part in ("train", "test")
    ]
    return [
        dataclasses.replace(style_task(base, STEPS), name="plays"),
        text_task(base, "Python", read, held_out, STEPS),
        text_task(base, "sums", sums[0], sums[1], STEPS),
    ]


def one_task(tasks: Sequence[Task]) -> Task:
    """The rows of all, for as many steps as all had: the same rows, the same tokens."""
    few = min(len(task.train) for task in tasks)
    rows = [row for task in tasks for row in task.train.examples[:few]]
    valid = [row for task in tasks for row in task.valid.examples]
    return dataclasses.replace(
        tasks[0],
        name="all",
        train=dataclasses.replace(tasks[0].train, examples=tuple(rows)),
        valid=dataclasses.replace(tasks[0].valid, examples=tuple(valid)),
        steps=sum(task.steps for task in tasks),
    )


def part_of(task: Task) -> Any:
    (part,) = task.test.values()
    return part


def few_valid(task: Task) -> Any:
    """Enough of the validation rows to choose a weight."""
    return dataclasses.replace(task.valid, examples=task.valid.examples[:40])


def tuned(
    base: Base,
    task: Task,
    ranks: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    first: int = 0,
) -> list[tuple[float, list[Params]]]:
    """For each rank the best learning rate on validation rows, and its adapter for each seed."""

    def train(own: Sequence[float], each: Sequence[int]) -> list[list[Params]]:
        """For each rank its adapters, one for each rate and seed."""
        starts = [base.adapter(base.lora(r, 16), seed) for r in ranks for seed in each]
        made = train_together(base, task, starts, own, list(each) * len(ranks))
        return [made[i : i + len(each)] for i in range(0, len(made), len(each))]

    best = [rates[0]] * len(ranks)
    if len(rates) > 1:
        tried = train(list(rates) * len(ranks), [TUNING_SEED + first] * len(rates))
        losses = [[x.loss for x in score(base, own, task.valid)] for own in tried]
        best = [rates[int(np.nanargmin(own))] for own in losses]
    print(f"{task.name}: learning rates {best}", flush=True)
    own = [rate for rate in best for _ in seeds]
    return list(zip(best, train(own, [seed + first for seed in seeds]), strict=True))


def one_seed(
    base: Base,
    tasks: Sequence[Task],
    alone: Mapping[str, Params],
    joint: Mapping[str, Params],
    rules: Sequence[str],
) -> dict[str, Any]:
    """The losses of everything that one seed's adapters can be made into."""
    known = dict(alone)
    weights = {}
    for rule in rules:
        weights[rule], known[rule] = merged(base, tasks, alone, rule)
    return {
        "bank_difference": bank_difference(base, tasks, alone),
        "weights": weights,
        "losses": losses_of(base, tasks, known | dict(joint)),
    }


def losses_of(
    base: Base, tasks: Sequence[Task], adapters: Mapping[str, Params], part: Any = part_of
) -> dict[str, Losses]:
    """Of each adapter its loss on each task."""
    found = {t.name: score(base, list(adapters.values()), part(t)) for t in tasks}
    return {
        name: {task: own[i].loss for task, own in found.items()} for i, name in enumerate(adapters)
    }


def merged(
    base: Base, tasks: Sequence[Task], alone: Mapping[str, Params], rule: Any
) -> tuple[float, Params]:
    """One adapter by a rule, each of the three with the weight that is best on validation rows."""
    config: LoraConfig = base.lora(RANK, 16)
    key = jax.random.key(0) if rule.startswith("dare") else None
    tries = {
        str(share): weighted_adapter(
            [(adapter, config) for adapter in alone.values()],
            [share] * len(alone),
            rule,
            key=key,
            layouts=base.pretrained.layouts,
            **RULES[rule],
        )[0]
        for share in SHARES
    }
    losses = losses_of(base, tasks, tries, few_valid)
    best = min(SHARES, key=lambda share: sum(losses[str(share)].values()))
    return best, tries[str(best)]


def bank_difference(base: Base, tasks: Sequence[Task], alone: Mapping[str, Params]) -> float:
    """The largest difference of a row's loss, rows of all tasks in one batch or each task alone.

    In nats per token.
    """
    config, layouts = base.lora(RANK, 16), base.pretrained.layouts
    bank = AdapterBank.empty(base.params, config, slots=len(alone), layouts=layouts)
    for name, adapter in alone.items():
        bank = bank.swap(name, adapter)
    sizes = {"batch_size": 8, "seq_length": 128, "packing": False}
    batches = {t.name: next(iter(eval_batches(part_of(t), **sizes))) for t in tasks}
    batches = {n: {k: v for k, v in b.items() if k != "rows"} for n, b in batches.items()}
    names = [name for name in batches for _ in range(sizes["batch_size"])]
    mixed = {k: np.concatenate([b[k] for b in batches.values()]) for k in batches[names[0]]}
    measure = jax.jit(row_sums, static_argnums=0)
    loss, count, _ = measure(base.model, bank.overlay(names), base.params, mixed)
    own = [measure(base.model, alone[n], base.params, batches[n])[0] for n in batches]
    return float(np.max(np.abs(loss - np.concatenate(own)) / count))


def kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of each way the share of each task's gain that it keeps, by seed: 1 is its own adapter's."""
    before = found["before"]
    shares: dict[str, dict[str, list[float]]] = {}
    for run in found["runs"]:
        for name, losses in run["losses"].items():
            for task, loss in losses.items():
                gain = before[task] - run["losses"][task][task]
                share = (before[task] - loss) / gain
                shares.setdefault(name, {}).setdefault(task, []).append(share)
    means = {
        n: [statistics.fmean(x) for x in zip(*own.values(), strict=True)]
        for n, own in shares.items()
    }
    return {name: {**own, "mean": means[name]} for name, own in shares.items()}


def table(found: Mapping[str, Any]) -> str:
    """Shares of the gain that are kept: mean (least..most) of the seeds."""
    tasks = list(found["before"])
    lines = []
    for name, own in found["kept"].items():
        weights = sorted({run["weights"].get(name) for run in found["runs"]} - {None})
        shown = ", ".join(f"{w:.2g}" for w in weights)
        shares = [Spread.of(own[task]) for task in (*tasks, "mean")]
        label = f"only the adapter for {name}" if name in tasks else name
        lines.append([label, shown, *(f"{s.mean:.2f} ({s.low:.2f}..{s.high:.2f})" for s in shares)])
    largest = max(run["bank_difference"] for run in found["runs"])
    losses = [
        f"{t} {found['before'][t]:.3f} → {Spread.of([r['losses'][t][t] for r in found['runs']])}"
        for t in tasks
    ]
    return "\n\n".join(
        [
            f"Losses of the base and of each task's own adapter: {'; '.join(losses)}.",
            markdown(["one adapter for all", "weights", *tasks, "mean"], lines),
            f"In a bank, rows of all three in one batch: no row's loss differs by more than"
            f" {largest:.1e} nats per token from that by its adapter alone.",
        ]
    )


def said(found: Mapping[str, Any]) -> str:
    """The summary's words: what one adapter in place of three keeps of their gains."""
    largest = max(run["bank_difference"] for run in found["runs"])
    kept = {name: Spread.of(own["mean"]).mean for name, own in found["kept"].items()}
    named = ("cat", "ties_svd", "linear", "trained on all, r 8")
    shares = ", ".join(f"{name} {kept[name]:.2f}" for name in named)
    off = f"losses differ by up to {largest:.0e} nats" if largest else "no loss differs"
    return f"swapped: {off}; made into one, kept of the gains: {shares}"


def picture(found: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    tasks = list(found["before"])
    ways = [name for name in found["kept"] if name not in tasks]
    for task, colour, shift in zip(tasks, APART, (-0.2, 0, 0.2), strict=False):
        for at, name in enumerate(ways):
            own = Spread.of(found["kept"][name][task])
            bars = [[own.mean - own.low], [own.high - own.mean]]
            label = task if at == 0 else None
            style = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "label": label}
            axes.errorbar([own.mean], [at + shift], xerr=bars, **style)
    axes.axvline(1, color=GREY, linestyle="--")
    axes.axvline(0, color=GREY)
    axes.set_yticks(range(len(ways)), ways)
    axes.invert_yaxis()
    label = "share of the gain of the task's own adapter (0: the base, 1: the adapter alone)"
    axes.set(xlabel=label, title="What one adapter keeps of three")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
