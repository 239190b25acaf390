"""What an adapter costs when a model answers: merged into the base, and beside it.

    python experiments/claims/latency.py    # on a quiet machine

Hu et al. 2021: a merged adapter adds no latency.  Unmerged it is two thin products more for each
matrix: r·(d_in + d_out) / (d_in·d_out) of its weights and work, and two calls that each take their
time whatever their size.  A random model of 60 million parameters reads prompts and writes tokens,
greedily, through `lora_jax.models.generate`; all ways take turns in one process.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

THREADS = 2
if hasattr(os, "sched_setaffinity"):  # before JAX counts them
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import costs  # noqa: E402, F401 (finds the modules of experiments/bench)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import outcome  # noqa: E402
from stats import ratio, rotated, spread  # noqa: E402

from lora_jax import (  # noqa: E402
    KernelLayout,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
)
from lora_jax._drawing import APART  # noqa: E402
from lora_jax.models import CausalLM, ModelConfig, generate, quantize_params  # noqa: E402

SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=8,
)
TINY = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                   num_attention_heads=2)  # fmt: skip
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
RANKS, BATCHES = (8, 64), (1, 8)
PROMPT, NEW = 128, 32
PHASES = {"prefill": (PROMPT, 1), "decode": (8, NEW)}
"""Tokens of a prompt, and new ones: almost all of the time is reading, or writing."""
Ways = dict[str, tuple[Any, Any]]


def main() -> None:
    options = outcome.options(__doc__ or "")
    begun = time.perf_counter()
    rounds = 2 if options.quick else 7
    before = machine.wait_for_quiet(0.0 if options.quick else 120.0)
    ways = models(TINY if options.quick else SHAPE, RANKS[:1] if options.quick else RANKS)
    rows = []
    for batch in BATCHES[:1] if options.quick else BATCHES:
        for phase, (prompt, new) in PHASES.items():
            rows += measured(ways, batch, phase, prompt, new, rounds)
            print(f"{phase}, batch {batch}", flush=True)
    results = {"quiet": before["quiet"], "threads": THREADS, "rounds": rounds, "rows": rows}
    outcome.save_results(options.out, "latency", results, begun)
    outcome.save_picture(options.out, "latency", picture(results))
    print(table(results))


def models(shape: ModelConfig, ranks: tuple[int, ...]) -> Ways:
    """Modules and parameters: each base alone, with an adapter, and with one merged into it."""
    module = CausalLM(shape)
    adapted = lora_linen(module)
    base = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    nf4 = quantize_params(base, QuantConfig())
    ways: Ways = {"f32 base": (module, base), "NF4 base": (module, nf4)}
    for rank in ranks:
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
        )
        adapter = init_adapter(jax.random.key(rank), base, config, layouts=LAYOUTS)
        merged = merge_adapter(base, adapter, layouts=LAYOUTS)
        ways[f"f32, r {rank} merged"] = (module, merged)
        ways[f"f32, r {rank} beside"] = (adapted, combine(base, adapter))
        ways[f"NF4, r {rank} beside"] = (adapted, combine(nf4, adapter))
    return ways


def measured(
    ways: Ways, batch: int, phase: str, prompt: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds of each way, and over those of its base in the same round."""
    vocabulary = next(iter(ways.values()))[0].config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt)).tolist()
    calls: dict[str, Callable[[], list[list[int]]]] = {
        name: functools.partial(generate, module, params, prompts, max_new_tokens=new)
        for name, (module, params) in ways.items()
    }
    written = {name: call() for name, call in calls.items()}  # and compiled
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):  # the first round warms up
        for name in rotated(list(calls), max(turn, 0)):
            begin = time.perf_counter()
            calls[name]()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begin) / new)
    rows = []
    for name, own in times.items():
        over = times["f32 base" if name.startswith("f32") else "NF4 base"]
        row = {"way": name, "phase": phase, "batch": batch}
        row |= {"milliseconds": spread(own), "over": ratio(own, over)}
        if name.endswith("merged"):
            beside = written[name.replace("merged", "beside")]
            row["same_tokens"] = float(np.mean(np.equal(beside, written[name])))
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    """Milliseconds for a prompt or for each new token, and the quotient with its quartiles."""
    columns = list(dict.fromkeys((row["phase"], row["batch"]) for row in results["rows"]))
    cells = {(row["way"], row["phase"], row["batch"]): row for row in results["rows"]}
    rows = []
    for way in dict.fromkeys(row["way"] for row in results["rows"]):
        line = [way]
        for column in columns:
            row = cells[way, *column]
            over, time = row["over"], row["milliseconds"]["median"]
            quotient = f"{over['median']:.3f} ({over['q1']:.3f}..{over['q3']:.3f})"
            line.append(f"{time:.1f}" if way.endswith("base") else quotient)
        rows.append(line)
    quiet = "" if results["quiet"] else "NOT QUIET: others used this machine meanwhile.\n\n"
    return quiet + outcome.markdown(["", *(f"{p}, batch {b}" for p, b in columns)], rows)


def said(results: dict[str, Any]) -> str:
    """The summary's words: a token at batch 1."""
    over = {
        row["way"]: row["over"]["median"]
        for row in results["rows"]
        if (row["phase"], row["batch"]) == ("decode", 1) and not row["way"].endswith("base")
    }
    return "a token at batch 1: " + ", ".join(f"{way} ×{x:.2f}" for way, x in over.items())


def picture(results: dict[str, Any]) -> Any:
    """The quotient of each way, one panel for each phase and batch."""
    from matplotlib.figure import Figure

    ways = [x for x in dict.fromkeys(r["way"] for r in results["rows"]) if not x.endswith("base")]
    columns = list(dict.fromkeys((row["phase"], row["batch"]) for row in results["rows"]))
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (column, colour) in enumerate(zip(columns, APART, strict=False)):
        own = {r["way"]: r["over"] for r in results["rows"] if (r["phase"], r["batch"]) == column}
        at = np.arange(len(ways)) + 0.15 * (number - (len(columns) - 1) / 2)
        middle = np.array([own[way]["median"] for way in ways])
        off = [middle - [own[w]["q1"] for w in ways], [own[w]["q3"] for w in ways] - middle]
        text = f"{column[0]}, batch {column[1]}"
        axes.errorbar(at, middle, off, fmt="o", color=colour, capsize=3, label=text)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(ways)), ways, rotation=20)
    axes.set(ylabel="time over that of its base")
    axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
