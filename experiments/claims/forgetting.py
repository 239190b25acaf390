"""What is forgotten: loss on the base's own kind of text against loss on the new task.

    python experiments/claims/forgetting.py

Biderman et al. 2024 find that "LoRA learns less and forgets less".  At the end of a run that may
only say that less was trained; so a whole frontier is drawn, over steps and learning rates: what
has been forgotten by the time that so much has been learned?

Two bases learn Shakespeare: the one of children's stories, whose own kind of text it has to write
itself; and the bundled one, which knows Python source, on modules of the standard library that it
was never trained on (`lora_jax.data.is_held_out`).
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import common
import numpy as np
import outcome
from common import Arm, Base, Task, texts
from full import FULL, arms, held_out, small, trained
from outcome import Spread
from tasks import style_task

from lora_jax import LoraConfig
from lora_jax._drawing import APART
from lora_jax.data import is_held_out, stdlib_modules
from lora_jax.models import generate

RANKS = (4, 32)
RATES: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "stories": ((3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3, 3e-3)),
    "bundled": ((3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3)),
}
"""For each base the learning rates of LoRA and of full fine-tuning."""
SEEDS = range(3)
LOOKS = (5, 10, 20, 40, 80)
SHARES = (0.5, 0.75, 0.95)
"""Of what the arm that learned least has learned: there, what was forgotten is compared."""
Found = dict[str, Any]
"""What was measured on one base: losses `before`, and the `runs`."""


def main() -> None:
    options = outcome.options(__doc__ or "")
    begun = time.perf_counter()
    results: dict[str, Found] = {"bases": {}}
    for name in list(RATES)[: 1 if options.quick else None]:
        results["bases"][name] = measured(*learning(name, options.quick), options.quick)
        outcome.save_results(options.out, "forgetting", results, begun)
    outcome.save_picture(options.out, "forgetting", picture(results))
    print(table(results))


def learning(name: str, quick: bool) -> tuple[Base, Task]:
    """Shakespeare, tested on its last plays and on text of the base's own kind."""
    base = common.load_base(name)
    task = style_task(base, LOOKS[0] if quick else LOOKS[-1])
    own = written(base) if name == "stories" else sources()
    parts = {"new": task.test["held-out plays"], "old": texts(base, own, 128)}
    test = {k: dataclasses.replace(x, examples=x.examples[:32]) for k, x in parts.items()}
    return base, small(dataclasses.replace(task, test=test), quick)


def written(base: Base) -> list[str]:
    """What the base writes when it is left to itself."""
    module, tokenizer = base.pretrained.module, base.pretrained.tokenizer
    begin = [[tokenizer.bos_id]] * 32
    rows = generate(module, base.params, begin, max_new_tokens=127, temperature=1.0, seed=0)
    return [tokenizer.decode(row) for row in rows]


def sources() -> list[str]:
    """A piece from the middle of each held-out module."""
    whole = [text for name, text in stdlib_modules() if is_held_out(name) and len(text) > 2000]
    return [text[len(text) // 2 :][:500] for text in whole]


def measured(base: Base, task: Task, quick: bool) -> Found:
    """Losses on both texts as training goes on."""
    kinds = (arms(base, RANKS), [Arm(FULL, LoraConfig())])
    seeds, runs = SEEDS[:1] if quick else SEEDS, []
    for kind, rates in zip(kinds, RATES[base.name], strict=True):
        for rate, seed in itertools.product(rates[:1] if quick else rates, seeds):
            runs += trained(base, task, [(arm, rate, seed) for arm in kind], LOOKS, task.test)
    before = {name: held_out(base, task, [{}], part)[0] for name, part in task.test.items()}
    return {"before": before, "runs": runs}


def names(found: Found) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in found["runs"]))


def by_rate(found: Found, arm: str) -> dict[float, list[Any]]:
    """An arm's runs, those of one learning rate together."""
    own = [run for run in found["runs"] if run["arm"] == arm]
    return {r: [run for run in own if run["rate"] == r] for r in sorted({x["rate"] for x in own})}


def path(found: Found, run: dict[str, Any]) -> list[tuple[float, float]]:
    """(nats gained on the new text, nats lost on the old) from the first step to the last."""
    new, old = found["before"]["new"], found["before"]["old"]

    def loss(look: dict[str, Any], part: str) -> float:
        return math.inf if look[part] is None else look[part]  # a file has no infinity

    return [(0.0, 0.0), *((new - loss(x, "new"), loss(x, "old") - old) for x in run["looks"])]


def forgotten(found: Found, run: dict[str, Any], learned: float) -> float:
    """What is lost by the time that so much is gained; not a number if it never is."""
    for (x, y), (to_x, to_y) in itertools.pairwise(path(found, run)):
        if x < learned <= to_x:
            return y + (learned - x) / (to_x - x) * (to_y - y)
    return math.nan


def best(spreads: Iterable[Spread]) -> Spread:
    """The least mean; a run that is not a number spoils that of its rate."""
    return min(spreads, key=lambda x: (math.isnan(x.mean), x.mean))


def frontier(found: Found, arm: str, learned: float) -> Spread:
    """The least that is forgotten at any one learning rate, with its spread over the seeds."""
    rates = by_rate(found, arm).values()
    return best(Spread.of([forgotten(found, run, learned) for run in runs]) for runs in rates)


def at_end(found: Found, arm: str) -> tuple[float, Spread, Spread]:
    """The learning rate that learned most, what it learned and what it lost."""

    def ends(runs: list[Any], axis: int) -> Spread:
        return Spread.of([path(found, run)[-1][axis] for run in runs])

    rates = by_rate(found, arm)
    rate = max(rates, key=lambda rate: ends(rates[rate], 0).mean)
    return rate, ends(rates[rate], 0), ends(rates[rate], 1)


def levels(found: Found) -> list[float]:
    """Parts of what the arm that learned least has learned, which all arms reach."""
    least = min(at_end(found, arm)[1].low for arm in names(found))
    return [share * least for share in SHARES]


def table(results: dict[str, Any]) -> str:
    rows = []
    for name in RATES:
        if name not in results["bases"]:
            rows.append([name, "not yet measured", *[""] * (3 + len(SHARES))])
            continue
        found = results["bases"][name]
        rows.append([name, *[""] * 4, *(f"at {level:.2f} learned" for level in levels(found))])
        for arm in names(found):
            rate, learned, lost = at_end(found, arm)
            at = (f"{frontier(found, arm, level)}" for level in levels(found))
            rows.append(["", arm, f"{rate:g}", learned, lost, *at])
    head = ["base", "trained", "rate that learned most", "learned", "forgotten then"]
    return outcome.markdown([*head, *["forgotten"] * len(SHARES)], rows)


def said(results: dict[str, Any]) -> str:
    """The summary's words."""
    parts = []
    for name, found in results["bases"].items():
        level = levels(found)[1]  # all arms reach it with room
        lost = (f"{arm} loses {frontier(found, arm, level).mean:.2f}" for arm in names(found))
        parts.append(f"{name} base, {level:.2f} nats learned: {', '.join(lost)}")
    return "; ".join(parts)


def picture(results: dict[str, Any]) -> Any:
    """The way of each arm and learning rate, from the first step to the last: means over seeds."""
    from matplotlib.figure import Figure

    bases = results["bases"]
    figure = Figure(figsize=(4.6 * len(bases) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    for axes, (name, found) in zip(panels, bases.items(), strict=True):
        for arm, colour in zip(names(found), APART, strict=False):
            for marker, (rate, runs) in zip("os^D", by_rate(found, arm).items(), strict=False):
                x, y = np.mean([path(found, run) for run in runs], axis=0).T
                text = f"{arm}, {rate:g}"
                axes.plot(x, y, color=colour, marker=marker, markersize=4, lw=1, label=text)
        axes.set(title=f"{name} base", xlabel="learned: nats per token gained on Shakespeare",
                 ylabel="forgotten: nats per token lost on its own text")  # fmt: skip
        axes.legend(frameon=False, fontsize="x-small", title="learning rate")
    return figure


if __name__ == "__main__":
    main()
