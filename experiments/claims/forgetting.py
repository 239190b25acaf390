"""What is forgotten: loss on the base's own kind of text against loss on the new task.

    python experiments/claims/forgetting.py

Biderman et al. 2024 find that "LoRA learns less and forgets less".  At the end of a run that may
only say that less was trained; so a whole frontier is drawn, over steps and learning rates: what
has been forgotten by the time that so much has been learned?

The bundled base knows Python source and learns Shakespeare.  Its own kind of text are modules of
the standard library that it was never trained on (`lora_jax.data.is_held_out`).
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import common
from common import Arm, Base, Spread, Task, texts
from full import FULL, arms, held_out, small, trained
from tasks import style_task

from lora_jax import LoraConfig
from lora_jax._drawing import APART
from lora_jax.data import is_held_out, stdlib_modules

RANKS = (4, 64)
LORA_RATES, FULL_RATES = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
SEEDS = range(3)
LOOKS = (5, 10, 20, 40, 80)
SHARES = (0.5, 0.75, 0.95)
"""Of what the arm that learned least has learned: there, what was forgotten is compared."""


def main() -> None:
    options = common.options(__doc__ or "")
    begun = time.perf_counter()
    base, task = learning(options.quick)
    results = measured(base, task, options.quick)
    common.save_results(options.out, "forgetting", results, begun)
    common.save_picture(options.out, "forgetting", picture(results))
    print(table(results))


def learning(quick: bool) -> tuple[Base, Task]:
    """Shakespeare, tested on its last plays and on Python source."""
    base = common.load_base("bundled")
    task = style_task(base, LOOKS[0] if quick else LOOKS[-1])
    new, old = task.test["held-out plays"], texts(base, own_texts(), 128)
    test = {
        name: dataclasses.replace(part, examples=part.examples[:32])
        for name, part in (("new", new), ("old", old))
    }
    return base, small(dataclasses.replace(task, batch_size=4, test=test), quick)


def own_texts() -> list[str]:
    """A piece from the middle of each held-out module."""
    sources = [text for name, text in stdlib_modules() if is_held_out(name) and len(text) > 2000]
    return [text[len(text) // 2 :][:500] for text in sources]


def measured(base: Base, task: Task, quick: bool) -> dict[str, Any]:
    """Losses on both texts as training goes on."""
    groups: list[tuple[list[Arm], Sequence[float]]] = [
        (arms(base, RANKS), LORA_RATES),
        ([Arm(FULL, LoraConfig())], FULL_RATES),
    ]
    seeds, runs = SEEDS[:1] if quick else SEEDS, []
    for group, rates in groups:
        for rate, seed in itertools.product(rates[:1] if quick else rates, seeds):
            runs += trained(base, task, [(arm, rate, seed) for arm in group], LOOKS, task.test)
    before = {name: held_out(base, task, [{}], part)[0] for name, part in task.test.items()}
    return {"before": before, "runs": runs}


def names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in results["runs"]))


def by_rate(results: dict[str, Any], arm: str) -> dict[float, list[Any]]:
    """An arm's runs, those of one learning rate together."""
    own = [run for run in results["runs"] if run["arm"] == arm]
    return {r: [run for run in own if run["rate"] == r] for r in sorted({x["rate"] for x in own})}


def path(results: dict[str, Any], run: dict[str, Any]) -> list[tuple[float, float]]:
    """(nats gained on the new text, nats lost on the old) from the first step to the last."""
    new, old = results["before"]["new"], results["before"]["old"]
    return [(0.0, 0.0), *((new - x["new"], x["old"] - old) for x in run["looks"])]


def forgotten(results: dict[str, Any], run: dict[str, Any], learned: float) -> float:
    """What is lost by the time that so much is gained; not a number if it never is."""
    for (x, y), (to_x, to_y) in itertools.pairwise(path(results, run)):
        if x < learned <= to_x:
            return y + (learned - x) / (to_x - x) * (to_y - y)
    return math.nan


def best(found: Iterable[Spread]) -> Spread:
    """The least mean; a run that is not a number spoils that of its rate."""
    return min(found, key=lambda x: (math.isnan(x.mean), x.mean))


def frontier(results: dict[str, Any], arm: str, learned: float) -> Spread:
    """The least that is forgotten at any one learning rate, with its spread over the seeds."""
    rates = by_rate(results, arm).values()
    return best(Spread.of([forgotten(results, run, learned) for run in runs]) for runs in rates)


def at_end(results: dict[str, Any], arm: str) -> tuple[float, Spread, Spread]:
    """The learning rate that learned most, what it learned and what it lost."""

    def ends(runs: list[Any], axis: int) -> Spread:
        return Spread.of([path(results, run)[-1][axis] for run in runs])

    rates = by_rate(results, arm)
    rate = max(rates, key=lambda rate: ends(rates[rate], 0).mean)
    return rate, ends(rates[rate], 0), ends(rates[rate], 1)


def levels(results: dict[str, Any]) -> list[float]:
    """Parts of what the arm that learned least has learned, which all arms reach."""
    least = min(at_end(results, arm)[1].low for arm in names(results))
    return [share * least for share in SHARES]


def table(results: dict[str, Any]) -> str:
    at, rows = levels(results), []
    for arm in names(results):
        rate, learned, lost = at_end(results, arm)
        rows.append([arm, f"{rate:g}", learned, lost, *(frontier(results, arm, x) for x in at)])
    head = ["trained", "rate", "most learned", "forgotten then"]
    return common.markdown([*head, *(f"forgotten at {x:.2f} learned" for x in at)], rows)


def picture(results: dict[str, Any]) -> Any:
    """Every run from its first step to its last; those of one arm in one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for arm, colour in zip(names(results), APART, strict=False):
        for rate, runs in by_rate(results, arm).items():
            marker = dict(zip(by_rate(results, arm), "os^", strict=False))[rate]
            for run in runs:
                x, y = zip(*path(results, run), strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=0.8)
        axes.plot([], [], color=colour, label=arm)
    axes.legend(frameon=False, title="circle, square, triangle:\nrising learning rates")
    axes.set(xlabel="learned: nats per token gained on Shakespeare",
             ylabel="forgotten: nats per token lost on Python source")  # fmt: skip
    return figure


if __name__ == "__main__":
    main()
