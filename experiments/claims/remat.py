"""Rematerialization: the time it costs and the memory it saves, with LoRA and without.

    python experiments/claims/remat.py    # on a quiet machine

Chen et al. 2016 compute the forward pass once more for the backward pass, "about 30 % more time".
That is 4/3, where a step is a forward pass and a backward pass of twice its work.  Under LoRA the
backward pass forms no gradient of the base's weights, and is about as much work as the forward
pass: then computing all of it again is 3/2.
"""

import time
from typing import Any

import outcome
from costs import cost_table, measured

from lora_jax._drawing import BLUE, VERMILION

CASES = {
    "r8/everything": "LoRA, keeps everything",
    "r8/dots": "LoRA, keeps dots",
    "r8/names": "LoRA, keeps names",
    "r8/nothing": "LoRA, keeps nothing",
    "full/everything": "full, keeps everything",
    "full/nothing": "full, keeps nothing",
}


def main() -> None:
    options = outcome.options(__doc__ or "")
    begun = time.perf_counter()
    cases = {k: CASES[k] for k in ("r8/everything", "r8/nothing")} if options.quick else CASES
    results = measured(cases, same_way, 2 if options.quick else 12, options.quick)
    outcome.save_results(options.out, "remat", results, begun)
    outcome.save_picture(options.out, "remat", picture(results))
    print(cost_table(results))


def same_way(case: str) -> str:
    """The case that trains the same and keeps everything."""
    return f"{case.partition('/')[0]}/everything"


def said(results: dict[str, Any]) -> str:
    """The summary's words."""
    parts = []
    for way in ("LoRA", "full"):
        kept = (results["cases"][f"{way}, keeps {what}"] for what in ("everything", "nothing"))
        most, least = (own["temp_bytes"]["median"] / 1e6 for own in kept)
        time = results["cases"][f"{way}, keeps nothing"]["over"]["median"]
        parts.append(f"{way} ×{time:.2f} in time, {most:,.0f} to {least:,.0f} MB of temporaries")
    return "; ".join(parts)


def picture(results: dict[str, Any]) -> Any:
    """Time over memory: what a policy pays and what it gets, for each of the two ways to train."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for label, own in results["cases"].items():
        way, _, kept = label.partition(", keeps ")
        colour = VERMILION if way == "full" else BLUE
        over, memory = own["over"], own["temp_bytes"]["median"] / 1e6
        off = [[over["median"] - over["q1"]], [over["q3"] - over["median"]]]
        axes.errorbar(memory, over["median"], off, fmt="o", color=colour, capsize=3)
        text, below = f"{way}, {kept}", (way, kept) == ("full", "nothing")  # or they would meet
        place = {"xytext": (6, -14 if below else 6), "textcoords": "offset points"}
        axes.annotate(text, (memory, over["median"]), **place)
    axes.margins(x=0.25, y=0.2)
    axes.set(
        xlabel="temporaries of the compiled step (MB)",
        ylabel="time over the step that keeps everything",
        title="What the backward pass keeps",
    )
    return figure


if __name__ == "__main__":
    main()
