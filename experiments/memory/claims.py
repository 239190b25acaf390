"""What people say of LoRA's memory, computed for an 8B shape by compiling each case for an H200.

    python experiments/memory/claims.py       # needs jax[cuda13], no GPU

Every row is a plan (`lora_jax.plan`) of configs/llama3_8b_qlora.yaml with a few words changed.
"""

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

DENSE = "--quant null"
FULL = f"{DENSE} --train.method full"
CASES = {
    "full, float32 weights": FULL,
    "full, bfloat16 weights": f"{FULL} --model.param_dtype bfloat16",
    "full, bfloat16 weights, 8-bit AdamW": (
        f"{FULL} --model.param_dtype bfloat16 --train.optimizer adamw_8bit"
    ),
    "LoRA, r 8 on q and v": f"{DENSE} --lora.r 8 --lora.target_modules [q_proj,v_proj]",
    "LoRA, r 16 on all linear": DENSE,
    "QLoRA, r 8 on q and v": "--lora.r 8 --lora.target_modules [q_proj,v_proj]",
    "QLoRA, r 16 on all linear": "",
    "the same, embedding and head in NF4": "--quant.embedding nf4 --quant.head nf4",
    "the same, 8-bit AdamW": "--train.optimizer adamw_8bit",
    "the same, remat names": "--model.remat names",
    "the same, remat dots": "--model.remat dots",
    "the same, remat offload": "--model.remat offload",
    "the same, no remat": "--model.remat everything",
}
COLUMNS = ("weights", "adapter", "gradients", "optimizer", "activations", "temporaries", "sum")


def main() -> None:
    from lora_jax.plan import plan

    always = ["--train.batch_size", "1", "--train.accumulate", "1"]
    print("1 × 2048 tokens, bfloat16 activations, remat nothing where not said; 10^9 bytes\n")
    print(f"| case | trainable | share | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (3 + len(COLUMNS)), flush=True)
    for name, words in CASES.items():
        made = plan("configs/llama3_8b_qlora.yaml", "h200", [*always, *words.split()])
        owners, trained = made.owners, made.model["trainable"]
        sizes = [owners["base"] + owners["scales"], owners["adapter"], owners["gradients"]]
        sizes += [owners["optimizer"], owners["activations"]]
        sizes += [owners["temporaries"] + owners["other"], made.total]
        share = trained / made.model["parameters"]
        cells = " | ".join(f"{size / 1e9:.3f}" for size in sizes)
        print(f"| {name} | {trained:,} | {share:.2%} | {cells} |", flush=True)


if __name__ == "__main__":
    with contextlib.chdir(ROOT):
        main()
