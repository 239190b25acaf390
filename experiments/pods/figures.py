"""What compiled programs exchange between devices, and what each does: the table of README.md.

    python experiments/pods/figures.py    # after ./lora install plan-tpu, ./lora install plan-gpu

Llama 3.1 8B (and 70B where it says so) from their config.json alone, compiled for 8 H100s and for
slices of TPU v5e; no GPU or TPU is needed.
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
GPUS, EIGHT, SLICE, ALL = "h100x8", "v5e:2x4", "v5e:4x4", "v5e:16x16"
BLOCKS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Parameters of the blocks' kernels in Llama 3.1 8B."""
Row = tuple[str, str, str]


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


def data_parallel() -> Iterator[Row]:
    for target in (GPUS, EIGHT):
        made = compiled(target, 8, "--mesh.data", "8")
        ratio = total(exchanged(made, "all-reduce")) / made.owners["gradients"]
        others = ", ".join({x["kind"] for x in made.collectives} - {"all-reduce"})
        yield (
            f"data 8 ({target}): all-reduced bytes over those of the adapter's float32 gradients",
            "<= 1.02, no gather",
            f"{ratio:.3f} (they are summed in bfloat16), {others or 'nothing else'}",
        )


def fsdp() -> Iterator[Row]:
    for target in (GPUS, EIGHT):
        made = compiled(target, 8, "--mesh.fsdp", "8")
        dense = compiled(target, 8, "--mesh.fsdp", "8", "--quant", "null")
        gathers, whole = exchanged(made, "all-gather"), exchanged(dense, "all-gather")
        dtypes = ", ".join(sorted({x["dtype"] for x in gathers}))
        permuted = total(exchanged(dense, "collective-permute"))
        yield (
            f"fsdp 8 ({target}), NF4 with double quantization: gathered bytes over twice those of"
            " the bfloat16 weights, which is what bfloat16 gathers",
            "<= 0.27, no gather of floats",
            f"{total(gathers) / (4 * BLOCKS):.4f} ({total(gathers) / 1e9:.2f} GB; bfloat16"
            f" {total(whole) / 1e9:.2f}, and {permuted / 1e9:.2f} in permutes), gathered: {dtypes}",
        )


def tensor_parallel() -> Iterator[Row]:
    activation = 8 * 2048 * 4096 * 2
    for target in (GPUS, EIGHT):
        words = ("--mesh.tensor", "8", "--lora.target_modules")
        made = compiled(target, 8, *words, "all-linear")
        base = compiled(target, 8, *words, "[q_proj]", "--lora.r", "1")
        ours, least = (total(exchanged(p, "all-reduce")) / activation / 32 for p in (made, base))
        more = total(made.collectives) - total(exchanged(made, "all-reduce"))
        yield (
            f"tensor 8 ({target}): bytes all-reduced in a layer over those of an activation, with"
            " all linear layers adapted; with q_proj alone, rank 1",
            "as many, no permute",
            f"{ours:.2f}; {least:.2f}; all others {more / activation / 32:.2f}, permuted"
            f" {total(exchanged(made, 'collective-permute')) / activation / 32:.2f}",
        )


def scaling() -> Iterator[Row]:
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


def seventy() -> Iterator[Row]:
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
