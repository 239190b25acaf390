"""A step of DoRA over a step of LoRA, both in turn in one process.

    python experiments/lora_family/dora.py [--rounds 12]

The shape of `experiments/bench` on CPU: 8 layers, d 512, 4 x 256 tokens, rank 8, all linear
layers, float32 and NF4.  Writes `dora_cpu.json`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from together import LAYOUTS, SHAPES, random_base

from lora_jax import LoraConfig, QuantConfig, init_adapter, lora_linen
from lora_jax.models import CausalLM, ModelConfig
from lora_jax.optim import freeze_base
from lora_jax.train import init_state, make_step

HERE = Path(__file__).resolve().parent
BATCH, SEQ = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of DoRA over one of LoRA.")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    found: dict[str, Any] = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "rows": []}
    for quant in (None, QuantConfig()):
        found["rows"].append(measured(quant, options.rounds))
        print(json.dumps(found["rows"][-1]), flush=True)
    text = json.dumps(found, indent=1) + "\n"
    (HERE / "dora_cpu.json").write_text(text, encoding="utf-8")


def measured(quant: QuantConfig | None, rounds: int) -> dict[str, Any]:
    config = ModelConfig(**SHAPES["cpu"])
    base = random_base(config, jnp.float32, quant)
    tx = freeze_base(optax.adamw(1e-3))
    step = make_step(lora_linen(CausalLM(config)), tx)
    ids = jax.random.randint(jax.random.key(9), (1, BATCH, SEQ), 0, config.vocab_size)
    ones, places = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(SEQ), ids.shape)
    batch = {"input_ids": ids, "positions": places, "segment_ids": ones, "loss_mask": ones == 1}
    states = {}
    for name in ("lora", "dora"):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=name == "dora")
        adapter = init_adapter(jax.random.key(1), base, lora, layouts=LAYOUTS)
        states[name] = init_state(adapter, tx, jax.random.key(0))
    times: dict[str, list[float]] = {"lora": [], "dora": []}
    for turn in range(-2, rounds):  # two rounds warm up
        for name in ("lora", "dora") if turn % 2 else ("dora", "lora"):
            begin = time.perf_counter()
            states[name], metrics = step(states[name], base, batch)
            jax.block_until_ready(metrics)
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    ratios = [d / x for d, x in zip(times["dora"], times["lora"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "base": "float32" if quant is None else quant.format,
        "ratio": statistics.median(ratios),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "rounds": rounds,
        "lora_s": statistics.median(times["lora"]),
        "dora_s": statistics.median(times["dora"]),
    }


if __name__ == "__main__":
    main()
