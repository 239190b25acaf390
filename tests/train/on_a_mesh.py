"""What a run does on eight devices of a CPU: prints as JSON what its programs exchange, and trains.

    python on_a_mesh.py DIRECTORY NAME ...

DIRECTORY holds `run.yaml`; a NAME is one of `PROGRAMS`, or of `RUNS`, whose directory it becomes.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # not in a process that imports this for its constants
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )

import jax  # noqa: E402

from lora_jax.plan._compile import compile_plan  # noqa: E402
from lora_jax.plan._targets import parse_target  # noqa: E402
from lora_jax.quant import _matmul  # noqa: E402
from lora_jax.train import load_config, train  # noqa: E402

# Kernels as small as these are multiplied slab by slab, as large ones are.
_matmul.LARGEST_DENSE = 2**28
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "dtype": "bfloat16",
}
NF4 = ["--quant.format", "nf4", "--quant.double_quant", "true"]
PROGRAMS = {
    "one": (1, ["--train.batch_size", "1", *NF4]),
    "data": (8, NF4),
    "fsdp": (8, ["--mesh.fsdp", "8", *NF4]),
    "fsdp_dense": (8, ["--mesh.fsdp", "8"]),
    "tensor": (8, ["--mesh.tensor", "4", *NF4]),
    "tensor_base": (
        8,
        ["--mesh.tensor", "4", "--lora.target_modules", "[q_proj]", "--lora.r", "1", *NF4],
    ),
}
RUNS = {
    "data_fsdp_tensor": (
        ["--mesh.fsdp", "2", "--mesh.tensor", "2"],
        ["--quant.format", "nf4", "--quant.block_size", "32"],
    ),
    "sequence": (["--mesh.sequence", "2"], ["--train.batch_size", "3"]),
    "full": (["--mesh.fsdp", "4"], ["--train.method", "full"]),
}
"""Words for eight devices, and words for any number."""


def compiled(directory: Path, count: int, words: list[str]) -> dict:
    """A plan of the larger model's step on so many devices."""
    model = directory / "larger"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPE))
    words = ["--model.path", str(model), "--model.dtype", "bfloat16", "--model.remat", "nothing",
             "--train.batch_size", "8", "--data.max_length", "128", *words]  # fmt: skip
    config = load_config(directory / "run.yaml", words)
    target = dataclasses.replace(parse_target("cpu"), count=count)
    return compile_plan(config, target)


def main(directory: Path, names: list[str]) -> None:
    made = {name: compiled(directory, *PROGRAMS[name]) for name in names if name in PROGRAMS}
    for name in names:
        if name in RUNS:
            mesh, words = RUNS[name]
            output = ["--output", str(directory / name), "--train.samples", "1"]
            train(load_config(directory / "run.yaml", [*mesh, *words, *output]))
    print(json.dumps({"devices": jax.device_count(), **made}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
