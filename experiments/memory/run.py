"""The memory of a train step, compiled for one H200 and one TPU v5e that are not here.

Llama-3-8B's shapes, rank 8 on all linear layers of the blocks, AdamW, bfloat16 activations, remat
`nothing`, compiled by XLA and never run; nothing here says how fast it is.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = [
    # device, weights, rows, tokens of a row, target in 10^9 bytes
    ("h200", "nf4", 2, 2048, 8.3),
    ("h200", "nf4", 1, 512, 6.9),
    ("v5e", "nf4", 1, 2048, 7.6),
    ("v5e", "nf4", 1, 512, 6.9),
    ("h200", "bf16", 2, 2048, None),
    ("h200", "bf16", 1, 512, None),
    ("v5e", "bf16", 1, 2048, None),
    ("v5e", "bf16", 1, 512, None),
]
# XLA picks kernels by these figures of the card instead of asking one.
H200 = """gpu_device_info {threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
cuda_compute_capability {major: 9 minor: 0} registers_per_core_limit: 65536
registers_per_block_limit: 65536} platform_name: "CUDA"
dnn_version_info {major: 9 minor: 10 patch: 0} device_description_str: "NVIDIA H200" """
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def target_device(name: str) -> Any:
    """A device to compile for; no such device need be here."""
    from jax.experimental import topologies

    if name == "h200":
        __import__("jax_plugins.xla_cuda13")
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=H200
        )
    else:
        description = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return description.devices[0]


def train_step(config: Any, weights: str, rows: int, seq: int, options: Any) -> tuple[Any, Any]:
    """The library's step, and the shapes of what it takes."""
    import jax
    import jax.numpy as jnp
    import optax

    from lora_jax import LoraConfig, QuantConfig, init_adapter, lora_linen
    from lora_jax.lora import KernelLayout
    from lora_jax.models import CausalLM, abstract_params
    from lora_jax.optim import freeze_base
    from lora_jax.train import init_state, make_step

    quant = QuantConfig() if weights == "nf4" else None
    base = abstract_params(config, quant=quant, param_dtype="bfloat16")
    lora = LoraConfig(r=8, target_modules="all-linear")
    layouts = {"model/layers": KernelLayout(stack="model/layers")}
    tx = freeze_base(optax.adamw(1e-4))

    def make(key: Any) -> Any:
        adapter = init_adapter(key, base, lora, layouts=layouts)
        return init_state(adapter, tx, key, dtype=jnp.bfloat16)

    types = dict.fromkeys(["input_ids", "positions", "segment_ids"], jnp.int32)
    types["loss_mask"] = jnp.bool_
    batches = {name: jax.ShapeDtypeStruct((1, rows, seq), t) for name, t in types.items()}
    model = lora_linen(CausalLM(config, dtype=jnp.bfloat16, remat=options.remat))
    step = make_step(model, tx, chunk=options.chunk)
    return step, (jax.eval_shape(make, jax.random.key(0)), base, batches)


def llama_3_8b(layers: int) -> Any:
    from lora_jax.models import ModelConfig

    return ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )


def compile_case(device: str, weights: str, rows: int, seq: int, options: Any) -> None:
    """Print a row of the table."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(target_device(device))
    step, shapes = train_step(llama_3_8b(options.layers), weights, rows, seq, options)
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    memory = step.lower(*there).compile().memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    sizes = [arguments, memory.alias_size_in_bytes, temporaries, arguments + temporaries]
    row = [device, weights, f"{rows} × {seq}", *(f"{x / 1e9:.3f}" for x in sizes)]
    print(f"| {' | '.join(row)} | {memory.host_temp_size_in_bytes / 1e9:.3f} |", end="", flush=True)


def table(options: Any) -> None:
    """Each case in a process of its own: a compiler is loaded once, before JAX starts."""
    print(f"remat {options.remat}, {options.layers} layers, chunks of {options.chunk} tokens")
    print("10^9 bytes; compiled, not run\n")
    print("| for | base | tokens | arguments | aliased | temporaries | sum | host | target |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for device, weights, rows, seq, target in CASES:
        if options.device not in (None, device) or options.base not in (None, weights):
            continue
        if options.tokens not in (None, rows * seq):
            continue
        case = f"{device},{weights},{rows},{seq}"
        command = [sys.executable, __file__, "--case", case]
        for name in ("remat", "layers", "chunk"):
            command += [f"--{name}", str(getattr(options, name))]
        run = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True)
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            why = next((x for x in lines if "RESOURCE_EXHAUSTED" in x), lines[-1])
            print(f"| {device} | {weights} | {rows} × {seq} | {why[:200]} |")
        else:
            print(f" {target or ''} |", flush=True)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **TPU, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["h200", "v5e"])
    parser.add_argument("--base", choices=["nf4", "bf16"])
    parser.add_argument("--tokens", type=int, help="only the cases of so many tokens")
    parser.add_argument("--remat", default="nothing")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        device, weights, rows, seq = options.case.split(",")
        compile_case(device, weights, int(rows), int(seq), options)
    else:
        table(options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
