"""Which matrices to adapt, when all choices train equally many numbers?

    LORA_JAX_TEST_DATA=… python experiments/claims/targets.py [--quick]

q and v alone, all of attention, the MLP alone, or every matrix of a block: the fewer the matrices,
the higher the rank that the same budget buys.  On a style and on facts, each with its own best
learning rate.
"""

import time
from typing import Any

from common import Arm, Base, compare, load_base, tiny
from outcome import chosen_rate, markdown, options, save_picture, save_results, spread
from tasks import NAMES, STEPS, facts_task, style_task

from lora_jax._drawing import APART

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ARMS = {
    "q and v": (31, ["q_proj", "v_proj"]),
    "attention": (15, ATTENTION),
    "MLP": (10, MLP),
    "all linear": (6, ATTENTION + MLP),
}
"""The rank at which each trains as many numbers as the others, but for 3 %."""
RATES = {"style": (2.5e-3, 6e-3, 1.5e-2, 4e-2), "knowledge": (2e-3, 6e-3, 1.8e-2, 5e-2)}
SEEDS = (0, 1, 2)
PARTS = {"style": "held-out plays", "knowledge": "unseen phrasings"}


def main() -> None:
    given = options("Which matrices to adapt, at an equal number of trained parameters.")
    begun = time.perf_counter()
    base = load_base("stories")
    wanted = arms(base)[:1] if given.quick else arms(base)
    found: dict[str, Any] = {"tasks": {}}
    for task in (style_task(base, STEPS), facts_task(base, NAMES, STEPS)):
        rates, seeds = RATES[task.name], SEEDS
        if given.quick:
            task, rates, seeds = tiny(task), rates[1:2], SEEDS[:2]
        found["tasks"][task.name] = compare(base, task, wanted, rates, seeds)
        save_results(given.out, "targets", found, begun)
    save_picture(given.out, "targets", picture(found))
    print(table(found))


def arms(base: Base) -> list[Arm]:
    return [Arm(name, base.lora(rank, 16, modules)) for name, (rank, modules) in ARMS.items()]


def table(found: dict[str, Any]) -> str:
    """Of every arm its best learning rate and what it reached: mean (least..most) of the seeds."""
    lines = []
    for name, task in found["tasks"].items():
        for arm in dict.fromkeys(run["arm"] for run in task["runs"]):
            own = next(run for run in task["runs"] if run["arm"] == arm)
            rate = chosen_rate(own["rate"], own["edge"])
            part = PARTS[name]
            loss, exact = (spread(task["runs"], arm, part, what) for what in ("loss", "exact"))
            right = str(exact) if name == "knowledge" else ""
            lines.append([name, arm, ARMS[arm][0], own["trainable"], rate, loss, right])
    header = ["task", "adapted", "r", "trained", "learning rate", "held-out loss", "answers right"]
    return markdown(header, lines)


def said(found: dict[str, Any]) -> str:
    """The summary's words: answers right of each choice."""
    runs, part = found["tasks"]["knowledge"]["runs"], PARTS["knowledge"]
    right = [f"{arm} {spread(runs, arm, part, 'exact').mean:.2f}" for arm in ARMS]
    return f"facts, answers right at one budget: {', '.join(right)}"


def picture(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, task) in zip(figure.subplots(1, 2), found["tasks"].items(), strict=True):
        names = list(dict.fromkeys(run["arm"] for run in task["runs"]))
        for at, (arm, colour) in enumerate(zip(names, APART, strict=False)):
            own = spread(task["runs"], arm, PARTS[name])
            bars = [[own.mean - own.low], [own.high - own.mean]]
            axes.errorbar([own.mean], [at], xerr=bars, color=colour, marker="o", capsize=4)
        axes.set_yticks(range(len(names)), [f"{n}, r {ARMS[n][0]}" for n in names])
        axes.invert_yaxis()
        axes.margins(y=0.15)
        label = "loss (nats per trained token), three seeds"
        axes.set(xlabel=label, title=f"{name}: {PARTS[name]}")
    return figure


if __name__ == "__main__":
    main()
