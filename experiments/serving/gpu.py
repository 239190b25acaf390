"""What adapters cost a full batch on a GPU: none, 4 and 32 of them over one base.

    PYTHONPATH=. python experiments/serving/gpu.py [--width 2048 --layers 16 --rounds 7]

A random Llama in bfloat16 with the bundled tokenizer, 32 requests of 128 tokens that write 128
each at the same time.  "Base only" is an engine without slots; the others have as many slots of
rank 16 as adapters.  The engines stand side by side and take turns; a ratio is of one round.
Writes `gpu.json`, with the device's name in it.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.stats import ratio
from lora_jax import LoraConfig, init_adapter
from lora_jax.adapters import save_adapter
from lora_jax.models import (
    CausalLM,
    ModelConfig,
    Pretrained,
    bundled_model,
    load_pretrained,
    save_pretrained,
)
from lora_jax.serve import Engine, Request

HERE = Path(__file__).resolve().parent
ROWS, PROMPT, NEW, RANK, VOCABULARY = 32, 128, 128, 16, 4096
COUNTS = (0, 4, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters in a batch of 32 on a GPU.")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = random_base(Path(folder) / "base", options.width, options.layers)
        engines = {
            count: stack.enter_context(engine(base, Path(folder) / str(count), count))
            for count in COUNTS
        }
        for count, made in engines.items():
            together(made, count, 0)
        turns = range(1, options.rounds + 1)
        rounds = [{n: together(made, n, turn) for n, made in engines.items()} for turn in turns]
    speeds = {count: [each[count] for each in rounds] for count in COUNTS}
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "parameters": sum(x.size for x in jax.tree.leaves(base.params)),
        "tokens_per_second": {n: statistics.median(of) for n, of in speeds.items()},
        "over_base_only": {n: ratio(speeds[n], speeds[0]) for n in COUNTS[1:]},
    }
    (HERE / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def random_base(directory: Path, width: int, layers: int) -> Pretrained:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
    )
    ids = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(CausalLM(config).init)(jax.random.key(0), ids)["params"]
    save_pretrained(directory, params, config, dtype="bfloat16")
    for file in bundled_model().glob("tokenizer*"):
        shutil.copy(file, directory)
    return load_pretrained(directory, dtype="bfloat16", param_dtype="bfloat16")


@contextlib.contextmanager
def engine(base: Pretrained, folder: Path, count: int) -> Iterator[Engine]:
    """An engine of 32 rows with so many adapters in slots."""
    sizes = dict(max_rows=ROWS, max_length=PROMPT + NEW, prefill_chunk=PROMPT)
    with Engine(base, **sizes, adapter_slots=count, max_rank=RANK) as made:
        config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        for i in range(count):
            key = jax.random.key(i)
            tree = init_adapter(key, base.params, config, layouts=base.layouts)
            save_adapter(folder / str(i), tree, config, layouts=base.layouts)
            made.load_adapter(str(i), folder / str(i))
        yield made


def together(made: Engine, count: int, turn: int) -> float:
    """Tokens per second of 32 requests at one time, whose prompts nobody has read before."""
    prompts = np.random.default_rng(turn).integers(3, VOCABULARY, (ROWS, PROMPT)).tolist()
    start = time.perf_counter()
    tickets = [
        made.submit(
            Request(
                prompt,
                adapter=str(row % count) if count else None,
                max_new_tokens=NEW,
                stop_ids=(),
            )
        )
        for row, prompt in enumerate(prompts)
    ]
    tokens = sum(len(list(ticket)) for ticket in tickets)
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
