"""What four bits cost in quality, and what an adapter wins back: real models, equal budget.

    python experiments/quant_quality/run.py [--seeds 3] [--steps 60] [--model DIR --data FILE]
    python experiments/quant_quality/run.py --table      # only render what was measured

Trains the bundled base (or the model and rows given) on rows, and measures held-out rows: in full
precision and under each format, without an adapter, with LoRA, with LoftQ, and with a PiSSA start.
Each run is appended to `results.jsonl` as it ends, and what is there already is not run again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import table

from lora_jax import (
    QuantConfig,
    combine,
    dequantize,
    init_adapter,
    init_loftq,
    init_pissa,
    lora_linen,
    merge_adapter,
    quantize,
    trainable_mask,
)
from lora_jax._inspect import FORMATS as INSPECTED
from lora_jax._inspect import in_block, quantized
from lora_jax._tree import leaves_with_path
from lora_jax.data import batch_iterator, eval_batches
from lora_jax.quant import quantization_error
from lora_jax.train import (
    Job,
    RunConfig,
    evaluate,
    init_state,
    load_config,
    make_eval_step,
    make_optimizer,
    make_step,
    prepare,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORMATS: dict[str, QuantConfig | None] = {
    "float32": None,
    **{name: INSPECTED[name] for name in ("int8", "nf4", "fp4", "int4")},
}
STARTS = ("lora", "loftq", "pissa")
FULL_RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates of full fine-tuning, of which the first seed shows the best."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model and its rows, made ready once."""

    job: Job
    tx: Any
    step: Any
    eval_step: Any

    @property
    def config(self) -> RunConfig:
        return self.job.config

    def loss(self, params: Any, examples: Any = None) -> float:
        """Nats per trained token."""
        examples = self.job.eval if examples is None else examples
        return evaluate(self.eval_step, params, eval_batches(examples, **self.sizes)).loss

    @property
    def sizes(self) -> dict[str, Any]:
        """How rows are laid out, in training as in measuring."""
        train, data = self.config.train, self.config.data
        return {
            "batch_size": train.batch_size,
            "seq_length": data.seq_length,
            "packing": data.packing,
        }

    def hidden(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Last hidden states and predicted tokens of some held-out batches."""
        states, best = [], []
        for _, batch in zip(range(2), eval_batches(self.job.eval, **self.sizes), strict=False):
            h, top = _predict(self.job.model, params, {k: batch[k] for k in _INPUTS})
            real = np.asarray(batch["segment_ids"]) > 0
            states.append(np.asarray(h)[real])
            best.append(np.asarray(top)[real])
        return np.concatenate(states), np.concatenate(best)


_INPUTS = ("input_ids", "positions", "segment_ids")


@jax.jit(static_argnums=0)
def _predict(model: Any, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    hidden, _ = model.apply({"params": params}, *batch.values(), method="hidden_states")
    logits = model.apply({"params": params}, hidden, method="logits")
    return hidden, jnp.argmax(logits, axis=-1)


def make_bench(options: argparse.Namespace) -> Bench:
    raw = load_config(ROOT / "configs" / "quickstart.yaml")
    train = dataclasses.replace(raw.train, steps=options.steps)
    config = dataclasses.replace(raw, train=train, quant=None)
    if options.model:
        data = dataclasses.replace(
            config.data, train=options.data, eval=None, template="auto", train_rows=None
        )
        model = dataclasses.replace(config.model, path=options.model)
        config = dataclasses.replace(config, model=model, data=data)
    job = prepare(config)
    tx = make_optimizer(config.train, options.steps, lambda p: trainable_mask(p, config.lora))
    chunk = config.train.loss_chunk
    step, eval_step = make_step(job.model, tx, chunk=chunk), make_eval_step(job.model, chunk=chunk)
    return Bench(job, tx, step, eval_step)


def start(bench: Bench, format: str, how: str, seed: int) -> tuple[Any, Any]:
    """The base and the adapter before training."""
    dense, lora, layouts = bench.job.base, bench.config.lora, bench.job.layouts
    quant = FORMATS[format]
    if how == "pissa":
        return init_pissa(dense, lora, quant, layouts=layouts)
    if how == "loftq" and quant is not None:
        return init_loftq(dense, lora, quant, iterations=5, layouts=layouts)
    adapter = init_adapter(jax.random.key(seed), dense, lora, layouts=layouts)
    return in_format(bench, dense, quant), adapter


def in_format(bench: Bench, params: Any, quant: QuantConfig | None) -> Any:
    return params if quant is None else quantized(params, bench.job.pretrained.stacked, quant)


def train(
    bench: Bench, base: Any, trainable: Any, seed: int, tx: Any = None, step: Any = None
) -> Any:
    """The trained tree after the budget's steps, on the same batches for a seed."""
    tx, step = tx or bench.tx, step or bench.step
    state = init_state(trainable, tx, jax.random.key(seed))
    batches = batch_iterator(bench.job.train, **bench.sizes, seed=seed)
    for _, batch in zip(range(bench.config.train.steps), batches, strict=False):
        stacked = {k: np.asarray(v)[None] for k, v in batch.items() if k != "rows"}
        state, _ = step(state, base, stacked)
    return state.trainable


def weight_error(bench: Bench, base: Any, adapter: Any) -> float:
    """‖W - (W0 + scaling·A·B)‖ / ‖W‖ over all targets."""
    merged = merge_adapter(base, adapter, layouts=bench.job.layouts, dtype=jnp.float32)
    found, exact = dict(leaves_with_path(merged)), dict(leaves_with_path(bench.job.base))
    paths = [target.path for target in bench.job.targets]
    off = sum(float(jnp.sum((found[p] - exact[p]) ** 2)) for p in paths)
    return (off / sum(float(jnp.sum(exact[p] ** 2)) for p in paths)) ** 0.5


def agreement(first: tuple[Any, Any], second: tuple[Any, Any]) -> dict[str, float]:
    """Shares of positions with the same nearest neighbour, and with the same likeliest token."""
    neighbours = [_nearest(states[:1500]) for states, _ in (first, second)]
    return {
        "neighbour": float(np.mean(neighbours[0] == neighbours[1])),
        "top1": float(np.mean(first[1] == second[1])),
    }


def _nearest(states: np.ndarray) -> np.ndarray:
    unit = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-9)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -2)
    return alike.argmax(axis=1)


def embeddings(bench: Bench, quant: QuantConfig) -> dict[str, float]:
    """What quantizing the table of embeddings does to its rows."""
    table = jnp.asarray(dict(leaves_with_path(bench.job.base))["model/embed_tokens/embedding"])
    after = np.asarray(dequantize(quantize(table, quant, contracting=(1,)), jnp.float32))
    near = _nearest(np.asarray(table, np.float32)), _nearest(after)
    return {
        "rows": len(after),
        "equal_rows": len(after) - len(np.unique(after, axis=0)),
        "equal_before": len(after) - len(np.unique(np.asarray(table), axis=0)),
        "neighbour": float(np.mean(near[0] == near[1])),
    }


def bare(bench: Bench, reference: Any, format: str, _: str, __: int) -> dict[str, Any]:
    """A format without an adapter."""
    quant = FORMATS[format]
    params = in_format(bench, bench.job.base, quant)
    found = {"heldout": bench.loss(params), **agreement(reference, bench.hidden(params))}
    if quant is not None:
        stacked = bench.job.pretrained.stacked
        kernels = {p: x for p, x in leaves_with_path(bench.job.base) if in_block(p, stacked)}
        errors = [quantization_error(x, quant) for x in kernels.values()]
        found["rms"] = float(np.mean([np.mean(e.rms) for e in errors]))
        found["bits"] = (
            8
            * sum(quantize(x, quant, stacked=1).nbytes for x in kernels.values())
            / sum(x.size for x in kernels.values())
        )
        found["embedding"] = embeddings(bench, quant)
    return found


def tuned(bench: Bench, reference: Any, format: str, how: str, seed: int) -> dict[str, Any]:
    """An adapter trained over a format, from one of the starts."""
    base, adapter = start(bench, format, how, seed)
    found: dict[str, Any] = {"error": weight_error(bench, base, adapter)}
    found["start"] = bench.loss(combine(base, adapter))
    adapter = train(bench, base, adapter, seed)
    params = combine(base, adapter)
    found |= {"heldout": bench.loss(params), "train": bench.loss(params, some(bench.job.train))}
    if how == "lora":
        found |= merging(bench, base, adapter, FORMATS[format])
    return found


def merging(bench: Bench, base: Any, adapter: Any, quant: QuantConfig | None) -> dict[str, float]:
    """Loss once merged into the dequantized base, and once that is quantized again."""
    merged = merge_adapter(base, adapter, layouts=bench.job.layouts, dtype=jnp.float32)
    found = {"merged": bench.loss(merged)}
    if quant is not None:
        found["requantized"] = bench.loss(in_format(bench, merged, quant))
    return found


def full(bench: Bench, reference: Any, format: str, how: str, seed: int) -> dict[str, Any]:
    """All parameters trained, in bfloat16 in every pass, with a float32 copy that is updated."""
    section = dataclasses.replace(bench.config.train, learning_rate=float(how.split()[1]))
    model = lora_linen(bench.job.pretrained.module.clone(dtype=jnp.bfloat16))
    tx = make_optimizer(section, section.steps, lambda p: jax.tree.map(lambda _: True, p))
    step = make_step(model, tx, chunk=section.loss_chunk)
    params = train(bench, {}, bench.job.base, seed, tx, step)
    return {"heldout": bench.loss(params), "train": bench.loss(params, some(bench.job.train))}


def some(examples: Any, count: int = 120) -> Any:
    """As many training rows as there are held-out ones."""
    return dataclasses.replace(examples, examples=examples.examples[:count])


def best_rate(results: Path) -> float:
    records = [json.loads(line) for line in table.lines_of(results)]
    tried = [x for x in records if x["how"].startswith("full") and x["seed"] == 0]
    return float(min(tried, key=lambda x: x["heldout"])["how"].split()[1])


Measure = Callable[[Bench, Any, str, str, int], dict[str, Any]]


def cases(seeds: int, results: Path) -> Iterator[tuple[Measure, str, str, int]]:
    """Everything that is measured, a seed at a time."""
    for format in FORMATS:
        yield bare, format, "bare", 0
    for seed in range(seeds):
        for rate in FULL_RATES if seed == 0 else [best_rate(results)]:
            yield full, "float32", f"full {rate:g}", seed
        for format, quant in FORMATS.items():
            for how in STARTS:
                if quant is not None or how != "loftq":
                    yield tuned, format, how, seed


def main() -> None:
    parser = argparse.ArgumentParser(description="What four bits cost in quality.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", help="directory of another model")
    parser.add_argument("--data", help="its rows")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.model and (not options.data or options.results == parser.get_default("results")):
        parser.error("--model takes --data, and --results of its own")
    if not options.table:
        measure(options)
    print(table.of(options.results))


def measure(options: argparse.Namespace) -> None:
    bench = make_bench(options)
    reference = bench.hidden(bench.job.base)
    old = [json.loads(line) for line in table.lines_of(options.results)]
    done = {(x["format"], x["how"], x["seed"]) for x in old}
    for function, format, how, seed in cases(options.seeds, options.results):
        if (format, how, seed) in done:
            continue
        begun = time.perf_counter()
        found = function(bench, reference, format, how, seed)
        record = {"format": format, "how": how, "seed": seed, "steps": options.steps, **found}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        seconds = time.perf_counter() - begun
        print(f"{format} {how} {seed}: {found['heldout']:.4f} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
