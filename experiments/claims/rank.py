"""Does style need little rank, and knowledge more rank and a larger alpha?

    LORA_JAX_TEST_DATA=… python experiments/claims/rank.py [--quick]

Rank 1 to 64 (which is all the rank that the small base has) on Shakespeare's manner and on invented
facts, for three rules of alpha, each with its own best learning rate.
"""

import time
from typing import Any

from common import Arm, Base, compare, load_base, tiny
from outcome import Spread, chosen_rate, markdown, options, save_picture, save_results, spread
from tasks import NAMES, RATES, STEPS, facts_task, style_task

from lora_jax._drawing import APART, GREY

RANKS = (1, 4, 16, 64)
ENDS = (1, 64)
"""Ranks at which all rules of alpha are tried on knowledge; for style, `alpha.py` does."""
SEEDS = (0, 1, 2)
ALPHAS = {"alpha = 16": lambda r: 16, "alpha = r": lambda r: r, "alpha = 2r": lambda r: 2 * r}
PANELS = (
    ("style", "held-out plays", "loss", "loss (nats per token)"),
    ("knowledge", "unseen phrasings", "loss", "loss of the answer (nats per token)"),
    ("knowledge", "unseen phrasings", "exact", "answers right in unseen phrasings (share)"),
)


def main() -> None:
    given = options("Rank and alpha, for a style and for knowledge.")
    begun = time.perf_counter()
    base = load_base("stories")
    found: dict[str, Any] = {"tasks": {}}
    for task in (style_task(base, STEPS), facts_task(base, NAMES, STEPS)):
        wanted = arms(base, RANKS, ENDS if task.name == "knowledge" else ())
        rates, seeds = RATES[task.name], SEEDS
        if given.quick:
            task, wanted, rates, seeds = tiny(task), wanted[:2], rates[1:2], SEEDS[:2]
        found["tasks"][task.name] = compare(base, task, wanted, rates, seeds)
        save_results(given.out, "rank", found | verdict(found), begun)
    save_picture(given.out, "rank", picture(found))
    print(table(found))


def arms(base: Base, ranks: tuple[int, ...], ends: tuple[int, ...]) -> list[Arm]:
    """Alpha 16 at all ranks, the other rules at some; what is alpha 16 by two rules is one arm."""
    wanted = {(rank, 16): None for rank in ranks}
    wanted |= {(rank, own(rank)): None for rank in ends for own in ALPHAS.values()}
    return [Arm(arm_name(rank, alpha), base.lora(rank, alpha)) for rank, alpha in wanted]


def arm_name(rank: int, alpha: int) -> str:
    return f"r {rank}, alpha {alpha}"


def enough(runs: list[dict[str, Any]], part: str) -> int:
    """The lowest rank, at alpha 16, whose seeds reach into the range of the best rank's."""
    known = {run["arm"] for run in runs}
    of = {r: spread(runs, arm_name(r, 16), part) for r in RANKS if arm_name(r, 16) in known}
    best = min(of.values(), key=lambda s: s.mean)
    return min(rank for rank, own in of.items() if own.ties(best))


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """For each task and part, the rank above which nothing is gained."""
    return {
        "enough": {
            f"{name}, {part}": enough(task["runs"], part)
            for name, task in found["tasks"].items()
            for part in task["before"]
        }
    }


def table(found: dict[str, Any]) -> str:
    """Of every arm its best learning rate and what it reached: mean (least..most) of the seeds."""
    lines = []
    for name, task in found["tasks"].items():
        for arm in dict.fromkeys(run["arm"] for run in task["runs"]):
            own = next(run for run in task["runs"] if run["arm"] == arm)
            rate = chosen_rate(own["rate"], own["edge"])
            for part in task["before"]:
                loss, exact = (spread(task["runs"], arm, part, x) for x in ("loss", "exact"))
                right = f"{exact}" if name == "knowledge" else ""
                lines.append([name, part, arm, own["trainable"], rate, loss, right])
    header = ["task", "rows", "arm", "trained", "learning rate", "loss", "answers right"]
    return markdown(header, lines)


def said(found: dict[str, Any]) -> str:
    """The summary's words: what each rank comes to, all at one alpha."""
    arms = {rank: arm_name(rank, next(iter(ALPHAS.values()))(rank)) for rank in RANKS}
    parts = []
    for label, name, part, what in (
        ("style, loss", "style", "held-out plays", "loss"),
        ("facts, answers right", "knowledge", "unseen phrasings", "exact"),
    ):
        runs = found["tasks"][name]["runs"]
        means = [f"r {rank} {spread(runs, arms[rank], part, what).mean:.2f}" for rank in RANKS]
        parts.append(f"{label}: {', '.join(means)}")
    return "; ".join(parts)


def picture(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (name, part, what, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
        runs = found["tasks"][name]["runs"]
        for (rule, own), colour in zip(ALPHAS.items(), APART, strict=False):
            draw(axes, runs, own, part, what, color=colour, label=rule)
        place: dict[str, Any] = {}
        if what == "exact":
            axes.axhline(1 / 16, color=GREY, linestyle=":", label="one of 16 words, at random")
            axes.set_ylim(0, 1.02)
            place = {"loc": "lower right", "bbox_to_anchor": (1, 0.08)}
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, list(map(str, RANKS)))
        axes.minorticks_off()
        axes.set(xlabel="rank r", ylabel=label, title=f"{name}: {part}")
        axes.legend(frameon=False, fontsize="small", **place)
    return figure


def draw(axes: Any, runs: list[Any], alpha: Any, part: str, what: str, **style: Any) -> None:
    """Means over the rank, with bars from the least seed to the most."""
    known = {run["arm"] for run in runs}
    ranks = [r for r in RANKS if arm_name(r, alpha(r)) in known]
    if len(ranks) < 2:
        return
    points: list[Spread] = [spread(runs, arm_name(r, alpha(r)), part, what) for r in ranks]
    bars = [[s.mean - s.low for s in points], [s.high - s.mean for s in points]]
    means = [s.mean for s in points]
    style |= {"marker": "o", "markersize": 4, "capsize": 3}
    axes.errorbar(ranks, means, bars, **style)


if __name__ == "__main__":
    main()
