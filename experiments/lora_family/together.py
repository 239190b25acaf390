"""Eight adapters in one step against eight steps, by the tokens of each.

    python experiments/lora_family/together.py [--device cpu|gpu] [--base dense|nf4|both]
                                               [--rounds 12] [--tokens 16,64]

Both ways are compiled once and take turns; a ratio is of one round.  Writes
`together_cpu.json` or `together_gpu.json`; `table.py` shows it.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import KernelLayout, LoraConfig, QuantConfig, init_adapter, lora_linen
from lora_jax.models import CausalLM, ModelConfig, abstract_params, quantize_params
from lora_jax.optim import freeze_base
from lora_jax.train import init_joint_state, init_state, make_joint_step, make_step

HERE = Path(__file__).resolve().parent
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408,
            "num_hidden_layers": 8, "num_attention_heads": 8},
    "gpu": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TOKENS = {"cpu": (16, 64, 128, 512), "gpu": (16, 128, 512, 2048)}
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
RANK, ADAPTERS = 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters together against one by one.")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", help="tokens of each adapter, 16,64")
    parser.add_argument("--base", choices=("dense", "nf4", "both"), default="both")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if options.tokens:
        tokens = tuple(int(x) for x in options.tokens.split(","))
    else:
        tokens = TOKENS[options.device]
    found: dict[str, Any] = {"shape": SHAPES[options.device], "rank": RANK, "adapters": ADAPTERS}
    found |= {"hardware": jax.devices()[0].device_kind, "machine": platform.machine()}
    found |= {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "rows": []}
    formats = {"dense": [None], "nf4": [QuantConfig()], "both": [None, QuantConfig()]}
    for quant in formats[options.base]:
        bench = Bench(options.device, quant)
        for count in tokens:
            row = bench.measure(count, options.rounds)
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            file = options.out / f"together_{options.device}.json"
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


class Bench:
    """One base, and the two programs over it."""

    def __init__(self, device: str, quant: QuantConfig | None) -> None:
        self.config = ModelConfig(**SHAPES[device])
        self.dtype = jnp.bfloat16 if device == "gpu" else jnp.float32
        self.base = random_base(self.config, self.dtype, quant)
        self.quant = None if quant is None else quant.format
        self.tx = freeze_base(optax.adamw(1e-3))
        model = lora_linen(CausalLM(self.config, dtype=self.dtype))
        self.alone, self.joint = make_step(model, self.tx), make_joint_step(model, self.tx)

    def measure(self, tokens: int, rounds: int) -> dict[str, Any]:
        lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
        shapes = abstract_params(self.config)
        adapters = [
            init_adapter(jax.random.key(i), shapes, lora, layouts=LAYOUTS) for i in range(ADAPTERS)
        ]
        keys = [jax.random.key(i) for i in range(ADAPTERS)]
        states = [
            init_state(a, self.tx, k, dtype=self.dtype) for a, k in zip(adapters, keys, strict=True)
        ]
        state = init_joint_state(
            adapters, self.tx, seeds=range(ADAPTERS), rates=[1.0] * ADAPTERS, dtype=self.dtype
        )
        ids = jax.random.randint(jax.random.key(9), (1, 1, tokens), 0, self.config.vocab_size)
        ones = jnp.ones_like(ids)
        places = jnp.broadcast_to(jnp.arange(tokens), ids.shape)
        batch = {"input_ids": ids, "positions": places, "segment_ids": ones,
                 "loss_mask": ones == 1}  # fmt: skip
        times: dict[str, list[float]] = {"alone": [], "together": []}
        for turn in range(-2, rounds):  # two rounds warm up
            for name in ("alone", "together") if turn % 2 else ("together", "alone"):
                begin = time.perf_counter()
                if name == "together":
                    state, metrics = self.joint(state, self.base, batch)
                else:
                    for i in range(ADAPTERS):
                        states[i], metrics = self.alone(states[i], self.base, batch)
                jax.block_until_ready(metrics)
                if turn >= 0:
                    times[name].append(time.perf_counter() - begin)
        ratios = sorted(t / a for t, a in zip(times["together"], times["alone"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        return {
            "base": self.quant or jnp.dtype(self.dtype).name,
            "tokens": tokens,
            "ratio": statistics.median(ratios),
            "q1": quartiles[0],
            "q3": quartiles[2],
            "rounds": rounds,
            "alone_s": statistics.median(times["alone"]),
            "together_s": statistics.median(times["together"]),
        }


def random_base(config: ModelConfig, dtype: Any, quant: QuantConfig | None) -> Any:
    """A base as its module makes it, in four bits where asked for."""
    ids = jnp.ones((1, 2), jnp.int32)
    params = jax.jit(CausalLM(config).init)(jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params if quant is None else quantize_params(params, quant)


if __name__ == "__main__":
    main()
