"""How alpha should grow with the rank: not at all, as 2r, or as the root of r (rsLoRA)?

    LORA_JAX_TEST_DATA=… python experiments/claims/alpha.py [--quick]

The three rules agree at rank 8.  Over learning rates: where is the best, how much do its neighbours
lose, does rank 64 gain on rank 8, and what becomes of the rate that was best for rank 8?
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import Arm, Base, best_rate, load_base, tiny, tune_and_run
from outcome import chosen_rate, markdown, options, save_picture, save_results, spread
from tasks import style_task

from lora_jax._drawing import APART

COMMON = 8
"""The rank at which all rules have scaling 2."""
RANKS = (1, COMMON, 64)
RATES = tuple(1.5e-3 * 2**k for k in range(6))
STEPS = 100
SEEDS = (0, 1, 2)
RULES: dict[str, Callable[[int], float]] = {
    "alpha / r": lambda rank: 16 / rank,
    "2r / r": lambda rank: 2.0,
    "alpha / √r": lambda rank: 2 * math.sqrt(COMMON / rank),
}
"""The scaling that a rule gives a rank."""


def main() -> None:
    given = options("Rules of alpha against the learning rate.")
    begun = time.perf_counter()
    base = load_base("stories")
    task, ranks, rates, seeds = style_task(base, STEPS), RANKS, RATES, SEEDS
    if given.quick:
        task, ranks, rates, seeds = tiny(task), RANKS[:2], RATES[2:4], SEEDS[:2]
    tried, runs = tune_and_run(base, task, arms(base, ranks), rates, seeds)
    tokens = task.steps * task.batch_size * task.length
    found = {"steps": task.steps, "tokens": tokens, "tuning": tried, "runs": runs}
    found["rows"] = [row(found, rule, rank) for rule in RULES for rank in ranks]
    save_results(given.out, "alpha", found, begun)
    save_picture(given.out, "alpha", picture(found))
    print(table(found))


def arms(base: Base, ranks: Sequence[int]) -> list[Arm]:
    """One for each rank and scaling; that of the common rank belongs to all rules."""
    wanted = {name(rule, rank): (rule, rank) for rule in RULES for rank in ranks}
    return [Arm(key, config(base, rule, rank)) for key, (rule, rank) in wanted.items()]


def config(base: Base, rule: str, rank: int) -> Any:
    if rule == "alpha / √r":
        return base.lora(rank, 2 * math.sqrt(COMMON), use_rslora=True)
    return base.lora(rank, RULES[rule](rank) * rank)


def name(rule: str, rank: int) -> str:
    return f"r {rank}" if rank == COMMON else f"r {rank}, {rule}"


def curve(found: dict[str, Any], arm: str) -> dict[float, float]:
    """Validation loss over the learning rate; one that diverged is infinite."""
    own = [run for run in found["tuning"] if run["arm"] == arm]
    losses = {run["rate"]: run["valid"]["loss"] for run in own}
    return {rate: x if math.isfinite(x) else math.inf for rate, x in losses.items()}


def row(found: dict[str, Any], rule: str, rank: int) -> dict[str, Any]:
    """What one rule came to at one rank."""
    arm = name(rule, rank)
    losses = curve(found, arm)
    best = best_rate(found["tuning"], arm)
    common = best_rate(found["tuning"], name(rule, COMMON))
    return {
        "rule": rule,
        "rank": rank,
        "scaling": RULES[rule](rank),
        "best_rate": best,
        "edge": best in (min(losses), max(losses)),
        "within_0.02": [rate for rate, x in losses.items() if x < losses[best] + 0.02],
        "test": vars(spread(found["runs"], arm, "held-out plays")),
        "lost_at_rate_of_rank_8": losses[common] - losses[best],
    }


def table(found: dict[str, Any]) -> str:
    lines = []
    for own in found["rows"]:
        test, near = own["test"], own["within_0.02"]
        lines.append(
            [
                own["rule"],
                own["rank"],
                f"{own['scaling']:.3g}",
                chosen_rate(own["best_rate"], own["edge"]),
                f"{min(near):g}..{max(near):g}",
                f"{test['mean']:.3f} ({test['low']:.3f}..{test['high']:.3f})",
                f"{own['lost_at_rate_of_rank_8']:.3f}",
            ]
        )
    header = ["scaling by", "r", "scaling", "best learning rate", "rates within 0.02 of it"]
    return markdown([*header, "held-out loss", "lost at the best rate of r 8"], lines)


def said(found: dict[str, Any]) -> str:
    """The summary's words: rank 64 under each rule, tuned for itself and at the rate of rank 8."""
    parts = [
        f"{own['rule']} {own['test']['mean']:.3f}, {own['lost_at_rate_of_rank_8']:.2f} lost"
        for own in found["rows"]
        if own["rank"] == 64
    ]
    return f"r 64 tuned, and what it loses at the best rate of r 8: {'; '.join(parts)}"


def picture(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    ranks = sorted({own["rank"] for own in found["rows"]})
    for axes, rule in zip(panels, RULES, strict=True):
        for rank, colour in zip(ranks, APART, strict=False):
            losses = curve(found, name(rule, rank))
            rates, values = zip(*sorted(losses.items()), strict=True)
            axes.plot(rates, values, color=colour, marker="o", markersize=4, label=f"r {rank}")
            best = min(losses, key=losses.__getitem__)
            axes.plot(best, losses[best], color=colour, marker="*", markersize=13)
        axes.set_xscale("log")
        axes.set_xticks(RATES, [f"{1000 * rate:g}" for rate in RATES])
        axes.minorticks_off()
        axes.set(xlabel="peak learning rate (thousandths)", title=f"scaling by {rule}")
        axes.legend(frameon=False, fontsize="small")
    low = min(min(curve(found, name(rule, rank)).values()) for rule in RULES for rank in ranks)
    panels[0].set_ylim(low - 0.03, low + 0.6)  # what diverges leaves the picture
    panels[0].set_ylabel("validation loss (nats per token)")
    return figure


if __name__ == "__main__":
    main()
