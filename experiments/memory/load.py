"""The memory a process needs to read a checkpoint into four bits.

    python experiments/memory/load.py [--width 2048] [--layers 8]

Writes a random Llama in bfloat16 to a temporary directory, and reads it in processes of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "bench")]


def write(directory: Path, width: int, layers: int) -> None:
    import jax
    import jax.numpy as jnp

    from lora_jax.models import CausalLM, ModelConfig, save_pretrained

    config = ModelConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        tie_word_embeddings=False,
    )
    shapes = jax.eval_shape(CausalLM(config).init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))[
        "params"
    ]
    # The same numbers everywhere: what they are matters to nobody.
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, jnp.bfloat16), shapes)
    save_pretrained(directory, params, config, dtype="bfloat16")


def read(directory: str, format: str) -> None:
    """Print the bytes of the parameters, and how far the process's peak is above its start."""
    import jax
    import machine

    from lora_jax import QuantConfig
    from lora_jax.models import load_pretrained

    # What a first array and a first compilation take is not the checkpoint's.
    jax.block_until_ready(jax.jit(lambda x: x * 2)(jax.numpy.ones((256, 256))))
    machine.forget_peak()
    before = machine.resident()
    quant = None if format == "dense" else QuantConfig(format)
    params = load_pretrained(directory, quant=quant).params
    jax.block_until_ready(jax.tree.leaves(params))
    peak = machine.peak_resident() - before
    largest = max(x.size for x in jax.tree.leaves(params) if x.ndim == 2)
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    print(json.dumps({"held": held, "peak": peak, "largest": 2 * largest}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(*options.read)
        return
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), options.width, options.layers)
        size = sum(x.stat().st_size for x in Path(directory).glob("*.safetensors"))
        print(f"{options.layers} layers, width {options.width}: {size / 1e6:,.0f} MB in bfloat16\n")
        print("| base | held, MB | peak above the start, MB | over held, in largest tensors |")
        print("|---|---|---|---|")
        for format in ("nf4", "int8", "dense"):
            command = [sys.executable, __file__, "--read", directory, format]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            x = json.loads(run.stdout.splitlines()[-1])
            above = (x["peak"] - x["held"]) / x["largest"]
            print(f"| {format} | {x['held'] / 1e6:,.0f} | {x['peak'] / 1e6:,.0f} | {above:.2f} |")


if __name__ == "__main__":
    main()
