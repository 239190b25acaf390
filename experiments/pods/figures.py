"""What compiled programs exchange between devices, and what each does: the table of README.md.

    python experiments/pods/figures.py          # needs ./lora install plan-tpu, no TPU

Llama 3.1 8B (and 70B where it says so) from their config.json alone, compiled for TPU v5e slices.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lora_jax.plan import Plan, plan  # noqa: E402

CONFIG = "configs/llama3_8b_qlora.yaml"
ONE_STEP = ("--train.accumulate", "1")
EIGHT, SLICE, ALL = "v5e:2x4", "v5e:4x4", "v5e:16x16"
BLOCKS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Parameters of the blocks' kernels in Llama 3.1 8B."""


def main() -> None:
    print("| what | target | figure |\n|---|---|---|")
    for row in itertools.chain(data_parallel(), fsdp(), tensor_parallel(), scaling(), seventy()):
        print("| " + " | ".join(row) + " |", flush=True)


def compiled(target: str, rows: int, *words: str, config: str = CONFIG) -> Plan:
    made = plan(config, target, [*ONE_STEP, "--train.batch_size", str(rows), *words])
    print(f"  {target} {' '.join(words)}: {made.seconds:.0f} s", file=sys.stderr, flush=True)
    return made


def exchanged(made: Plan, kind: str) -> list[Any]:
    return [x for x in made.collectives if x["kind"] == kind]


def total(found: list[Any], of: str = "bytes") -> int:
    return sum(x[of] for x in found)


def data_parallel() -> Iterator[tuple[str, str, str]]:
    made = compiled(EIGHT, 8, "--mesh.data", "8")
    ratio = total(exchanged(made, "all-reduce")) / made.owners["gradients"]
    others = {x["kind"] for x in made.collectives} - {"all-reduce"} or "nothing else"
    yield (
        f"data 8: all-reduced bytes over those of the adapter's float32 gradients ({EIGHT})",
        "<= 1.02, no gather",
        f"{ratio:.3f} (summed in bfloat16), {others}",
    )


def fsdp() -> Iterator[tuple[str, str, str]]:
    dense = compiled(EIGHT, 8, "--mesh.fsdp", "8", "--quant", "null")
    made = compiled(EIGHT, 8, "--mesh.fsdp", "8")
    gathers, whole = exchanged(made, "all-gather"), exchanged(dense, "all-gather")
    ratio, ideal = total(gathers) / total(whole), total(whole) / (2 * 2 * BLOCKS)
    dtypes = ", ".join(sorted({x["dtype"] for x in gathers}))
    sizes = f"{total(gathers) / 1e9:.2f} of {total(whole) / 1e9:.2f} GB"
    yield (
        f"fsdp 8, NF4 with double quantization: gathered bytes over those of bfloat16 ({EIGHT})",
        "<= 0.27, no gather of floats",
        f"{ratio:.4f} ({sizes}), gathered: {dtypes};"
        f" bfloat16 gathers {ideal:.3f} of its weights twice",
    )


def tensor_parallel() -> Iterator[tuple[str, str, str]]:
    words = ("--mesh.tensor", "8", "--lora.target_modules")
    made = compiled(EIGHT, 8, *words, "all-linear")
    base = compiled(EIGHT, 8, *words, "[q_proj]", "--lora.r", "1")
    counts = [
        sum(x["count"] for x in p.collectives if x["largest"] >= 8 * 2048 * 4096)
        for p in (made, base)
    ]
    kinds = ", ".join(sorted({x["kind"] for x in made.collectives}))
    more = total(made.collectives) - total(base.collectives) - made.owners["gradients"]
    yield (
        f"tensor 8: exchanges with all linear layers adapted, and with q_proj of rank 1 ({EIGHT})",
        "as many, none permutes",
        f"{counts[0]} and {counts[1]} of an activation's size or combined with one; {kinds};"
        f" {more / total(base.collectives):+.2%} bytes beside the gradients",
    )


def scaling() -> Iterator[tuple[str, str, str]]:
    one = compiled("v5e:1x1", 1)
    for name, words in (("data", ()), ("fsdp 8, data", ("--mesh.fsdp", "8"))):
        eight, many = compiled(EIGHT, 8, *words), compiled(ALL, 256, *words)
        for label, made in (("8", eight), ("256", many)):
            start = one if name == "data" else eight
            yield (
                f"{name}, one row a device: {label} devices over {1 if start is one else 8}",
                "within 3 %",
                f"FLOPs {_flops(made) / _flops(start):.4f}, temporaries"
                f" {_temporaries(made) / _temporaries(start):.4f}",
            )


def _flops(made: Plan) -> float:
    return sum(made.flops.values())


def _temporaries(made: Plan) -> float:
    return sum(made.owners[name] for name in ("gradients", "activations", "temporaries"))


def seventy() -> Iterator[tuple[str, str, str]]:
    config = "configs/llama3_70b_pod.yaml"
    made = compiled(SLICE, 16, config=config)
    yield (
        f"Llama 3.1 70B, NF4, 2,048 tokens a device ({SLICE}, 16.9 GB a chip)",
        "fits",
        f"{made.total / 1e9:.2f} GB: {'fits' if made.fits else 'does not fit'}",
    )


if __name__ == "__main__":
    with contextlib.chdir(ROOT):
        main()
