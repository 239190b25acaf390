"""Seconds and memory to read a checkpoint, beside transformers.

    python experiments/models/load.py [--rounds 5] [--width 2048] [--layers 16]

Writes a random Llama of 1 billion parameters in bfloat16 to a temporary directory. Each reading has
a process of its own, the two take turns, and the file is in the system's page cache. Every weight
is touched once before the clock stops, since transformers only maps the file. Writes
`load_cpu.json`.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "bench")]
READERS = ("lora_jax", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading a checkpoint beside transformers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(*options.read)))
        return
    with tempfile.TemporaryDirectory() as directory:
        memory_load().write(Path(directory), options.width, options.layers)
        size = sum(x.stat().st_size for x in Path(directory).glob("*.safetensors"))
        rows: dict[str, list[dict]] = {reader: [] for reader in READERS}
        for number in range(options.rounds):
            for reader in READERS if number % 2 else READERS[::-1]:
                command = [sys.executable, __file__, "--read", reader, directory]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows[reader].append(json.loads(run.stdout.splitlines()[-1]))
                print(reader, rows[reader][-1], flush=True)
    found = {"bytes": size, "date": time.strftime("%Y-%m-%d"), "rounds": options.rounds}
    found |= {reader: summary(own) for reader, own in rows.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*rows.values(), strict=True)]
    found["ratio"] = [round(x, 3) for x in statistics.quantiles(ratios, n=4)]
    (HERE / "load_cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def memory_load() -> Any:
    """The script that measures what loading takes in four bits, which writes the same file."""
    path = ROOT / "experiments" / "memory" / "load.py"
    spec = importlib.util.spec_from_file_location("memory_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(rows: list[dict]) -> dict:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def read(reader: str, directory: str) -> dict:
    """Seconds, the bytes of the weights, those of the largest, and the peak above the start."""
    import machine

    load = {"lora_jax": ours, "transformers": theirs}[reader](directory)
    machine.forget_peak()
    before, begin = machine.resident(), time.perf_counter()
    sizes = load()
    seconds = time.perf_counter() - begin
    peak = machine.peak_resident() - before
    held, largest = sum(sizes), max(sizes)
    return {"seconds": seconds, "held": held, "largest": largest, "peak": peak}


def ours(directory: str):
    import jax

    from lora_jax.models import load_pretrained

    # What a first array and a first compilation take is not the checkpoint's.
    jax.block_until_ready(jax.jit(lambda x: x * 2)(jax.numpy.ones((256, 256))))

    def load() -> list[int]:
        leaves = jax.block_until_ready(jax.tree.leaves(load_pretrained(directory).params))
        # A stack's tensors are those of its layers.
        return [x.nbytes // len(x) for x in leaves if x.ndim == 3 for _ in range(len(x))] + [
            x.nbytes for x in leaves if x.ndim < 3
        ]

    return load


def theirs(directory: str):
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.ones(256, 256) @ torch.ones(256, 256)

    def load() -> list[int]:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        tensors = list(model.parameters())
        for tensor in tensors:
            tensor.view(-1)[::2048].sum()  # one number of each page
        return [tensor.nbytes for tensor in tensors]

    return load


if __name__ == "__main__":
    main()
