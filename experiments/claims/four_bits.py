"""What four bits cost, and whether an adapter recovers it.

    python experiments/claims/four_bits.py

Dettmers et al. 2023 (QLoRA): an adapter over an NF4 base is as good as one over 16 bits, and NF4
is better than int4.  The bundled base, as it is (bfloat16 weights) and rounded, says what functions
do; an adapter is trained over each, from the usual start and, over NF4, from LoftQ's.  The one that
was trained over bfloat16 is also laid over the rounded bases, which it has never seen.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import outcome
from common import TUNING_SEED, Base, Params, Task
from forgetting import sources
from full import held_out, near, small
from outcome import Spread

from lora_jax import QuantConfig, init_loftq
from lora_jax._drawing import BLUE, GREY, VERMILION
from lora_jax.models import quantize_params

RATES, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2), range(3)
RANK, ITERATIONS = 16, 5
DENSE = "bf16"
FORMATS = {
    "nf4": QuantConfig(),
    "int4": QuantConfig("int4"),
    "int4, zero point": QuantConfig("int4", zero_point=True),
}
LOFTQ = "nf4, LoftQ start"
Start = Callable[[int], Params]
"""From a seed to an adapter before its first step."""


def main() -> None:
    options = outcome.options(__doc__ or "")
    begun = time.perf_counter()
    base, task = near()
    task = dataclasses.replace(task, batch_size=2)
    own = common.texts(base, sources(), 128)
    own = dataclasses.replace(own, examples=own.examples[:100])
    if options.quick:
        task = small(dataclasses.replace(task, steps=4), True)
    task = dataclasses.replace(task, test={**task.test, "own": own})
    results = measured(base, task, options.quick)
    outcome.save_results(options.out, "four_bits", results, begun)
    outcome.save_picture(options.out, "four_bits", picture(results))
    print(table(results))


def rounded(base: Base, quant: QuantConfig) -> Base:
    return dataclasses.replace(base, params=quantize_params(base.params, quant))


def measured(base: Base, task: Task, quick: bool) -> dict[str, Any]:
    """Losses of every base bare and under an adapter, and of one base's adapter over others."""
    lora = base.lora(RANK, 2 * RANK)
    bases = {DENSE: base} | {name: rounded(base, quant) for name, quant in FORMATS.items()}
    bases = {name: bases[name] for name in (DENSE, "nf4")} if quick else bases
    cases: dict[str, tuple[Base, Start]] = {
        name: (own, lambda seed, own=own: own.adapter(lora, seed)) for name, own in bases.items()
    }
    if not quick:
        moved, adapter = init_loftq(
            base.params,
            lora,
            FORMATS["nf4"],
            iterations=ITERATIONS,
            layouts=base.pretrained.layouts,
        )
        cases[LOFTQ] = (dataclasses.replace(base, params=moved), lambda seed: adapter)
    bare = {
        name: {part: held_out(own, task, [{}], x)[0] for part, x in task.test.items()}
        for name, own in bases.items()
    }
    tried: dict[str, dict[float, float]] = {}
    runs: list[dict[str, Any]] = []
    for name, (own, start) in cases.items():
        tried[name] = tuning(own, task, start, RATES[1:2] if quick else RATES)
        rate = min(tried[name], key=lambda rate: tried[name][rate])
        seeds = SEEDS[:1] if quick else SEEDS
        adapters = [trained(own, task, start, rate, seed) for seed in seeds]
        others = [other for other in bases if name == DENSE and other != DENSE]
        for on in [name, *others]:
            target = bases.get(on, own)
            found = held_out(target, task, adapters, task.test["test"])
            runs += [
                {"trained": name, "on": on, "rate": rate, "seed": seed, "loss": loss}
                for seed, loss in enumerate(found)
            ]
        print(f"{name}: done", flush=True)
    return {"bare": bare, "tried": tried, "runs": runs}


def tuning(base: Base, task: Task, start: Start, rates: Sequence[float]) -> dict[float, float]:
    """The loss of each learning rate on the rows that choose one."""
    adapters = [trained(base, task, start, rate, TUNING_SEED) for rate in rates]
    return dict(zip(rates, held_out(base, task, adapters, task.valid), strict=True))


def trained(base: Base, task: Task, start: Start, rate: float, seed: int) -> Params:
    [adapter] = common.train_together(base, task, [start(seed)], [rate], [seed])
    return adapter


def losses(results: dict[str, Any], trained: str, on: str) -> Spread:
    own = [run for run in results["runs"] if (run["trained"], run["on"]) == (trained, on)]
    return Spread.of([run["loss"] for run in own])


def cases_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run["trained"], run["on"]) for run in results["runs"]))


def label(trained: str, on: str) -> str:
    return trained if trained == on else f"{on}, under {trained}'s adapter"


def table(results: dict[str, Any]) -> str:
    bare, dense = results["bare"], losses(results, DENSE, DENSE)
    first = bare[DENSE]
    rows = []
    for trained, on in cases_of(results):
        own, alone = losses(results, trained, on), bare.get(on if trained == on else "", None)
        costs = [f"{alone[p] - first[p]:+.3f}" for p in ("own", "test")] if alone else ["", ""]
        left = "tie" if own.ties(dense) else f"{own.mean - dense.mean:+.3f}"
        rate = next(x["rate"] for x in results["runs"] if x["trained"] == trained)
        chosen = outcome.chosen_rate(rate, rate in (RATES[0], RATES[-1]))
        left = "" if (trained, on) == (DENSE, DENSE) else left
        rows.append([label(trained, on), *costs, chosen, own, left])
    head = ["base", "cost on its own text", "cost on the task", "rate", "loss with adapter", "left"]
    return outcome.markdown(head, rows)


def said(results: dict[str, Any]) -> str:
    """The summary's words."""
    dense, own = losses(results, DENSE, DENSE), losses(results, "nf4", "nf4")
    cost = results["bare"]["nf4"]["test"] - results["bare"][DENSE]["test"]
    left = "a tie" if own.ties(dense) else f"{own.mean - dense.mean:+.3f}"
    return (
        f"NF4 costs {cost:+.3f} nats on the task before training; with adapters over both, {left}"
    )


def picture(results: dict[str, Any]) -> Any:
    """Held-out loss with an adapter, those trained over what they are used on in blue."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    cases = cases_of(results)[::-1]
    for at, (trained, on) in enumerate(cases):
        own = losses(results, trained, on)
        off = [[own.mean - own.low], [own.high - own.mean]]
        colour = BLUE if trained == on else VERMILION
        axes.errorbar(own.mean, at, xerr=off, fmt="o", color=colour, capsize=3)
    dense = losses(results, DENSE, DENSE)
    axes.axvspan(dense.low, dense.high, color=GREY, alpha=0.2, linewidth=0)
    axes.set_yticks(range(len(cases)), [label(*case) for case in cases])
    axes.set(xlabel="held-out loss with an adapter (nats per trained token)")
    return figure


if __name__ == "__main__":
    main()
