"""Held-out loss of the variants of LoRA on one task, at one budget, over seeds.

    python experiments/lora_family/variants.py [--only NAME ...] [--steps 30]

The bundled base learns to say what functions of the standard library do, from modules it is not
measured on.  Each variant gets the same rank, steps, rows and learning rates; the better rate of
each is shown.  Writes `variants.jsonl`, and goes on where it stopped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from lora_jax.train import grid, sweep

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "variants.jsonl"
RATES, SEEDS = "1e-3,4e-3", "0,1,2"
CONFIG = """
model: {path: bundled, remat: everything}
lora: {r: 8, lora_alpha: 16, target_modules: all-linear}
data: {train: stdlib, eval: stdlib-heldout, eval_rows: 60, template: plain, max_length: 128}
train: {steps: 30, batch_size: 4, learning_rate: 1e-3, loss_chunk: 128, tensorboard: false,
        samples: 0}
output: NOWHERE
"""
VARIANTS: dict[str, list[str]] = {
    "LoRA": [],
    "rsLoRA": ["--lora.use_rslora", "true"],
    "DoRA": ["--lora.use_dora", "true"],
    "gaussian": ["--lora.init_lora_weights", "gaussian"],
    "orthogonal": ["--lora.init_lora_weights", "orthogonal"],
    "PiSSA": ["--lora.init_lora_weights", "pissa"],
    "OLoRA": ["--lora.init_lora_weights", "olora"],
    "EVA": ["--lora.init_lora_weights", "eva"],
    "CorDA (kpm)": ["--lora.init_lora_weights", "corda", "--lora.corda_config",
                    "{corda_method: kpm}"],
    "LoRA-GA": ["--lora.init_lora_weights", "lora_ga"],
    "LoRA+": ["--train.optimizer", "lora_plus"],
    "LoRA-FA": ["--train.optimizer", "lora_fa"],
    "Riemannian": ["--train.optimizer", "riemannian"],
    "lora_bias": ["--lora.lora_bias", "true"],
    "NF4 base": ["--quant.format", "nf4"],
    "NF4 base, LoftQ": ["--quant.format", "nf4", "--lora.init_lora_weights", "loftq"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Variants of LoRA against held-out loss.")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    done = {(x["variant"], x["steps"]) for x in records()}
    for name in options.only or VARIANTS:
        if (name, options.steps) in done:
            continue
        begin = time.perf_counter()
        lines = [
            {"variant": name, "steps": options.steps, "date": time.strftime("%Y-%m-%d"), **found}
            for found in measured(VARIANTS[name], options.steps)
        ]
        # All of a variant at once, so that none is ever half there.
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        best = min(line["loss"] for line in lines)
        print(f"{name}: best {best:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)


def measured(words: list[str], steps: int) -> list[dict]:
    """Rate, seed and losses of each of a variant's runs."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "run.yaml")
        config.write_text(CONFIG.replace("NOWHERE", f"{directory}/sweep"))
        varied = ["--train.learning_rate", RATES, "--train.seed", SEEDS]
        members = grid(config, [*words, "--train.steps", str(steps), *varied])
        found = sweep(members)
    return [
        {
            "rate": record["varied"]["train.learning_rate"],
            "seed": record["varied"]["train.seed"],
            "before": record["before"],
            "loss": record["loss"],
            "trainable": record["trainable"],
        }
        for record in found
    ]


def records() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
