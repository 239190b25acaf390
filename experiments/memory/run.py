"""The memory of a train step, compiled for one H200 and one TPU v5e that are not here.

`compiled`: Llama-3-8B's shapes, rank 8 on all linear layers of the blocks, AdamW, bfloat16
activations, remat `nothing`, compiled by XLA and never run; nothing here says how fast it is.
`slope`: what one more layer costs on this CPU, in carries.  `loss`: the chunked cross-entropy
beside the plain one on this CPU, its memory and, interleaved, its time.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
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
    dense = "float32" if weights == "float32" else "bfloat16"
    base = abstract_params(config, quant=quant, param_dtype=dense)
    lora = LoraConfig(r=8, target_modules="all-linear")
    layouts = {"model/layers": KernelLayout(stack="model/layers")}
    tx = freeze_base(optax.adamw(1e-4))

    def make(key: Any) -> Any:
        adapter = init_adapter(key, base, lora, layouts=layouts)
        return init_state(adapter, tx, key, dtype=options.dtype)

    types = dict.fromkeys(["input_ids", "positions", "segment_ids"], jnp.int32)
    types["loss_mask"] = jnp.bool_
    batches = {name: jax.ShapeDtypeStruct((1, rows, seq), t) for name, t in types.items()}
    model = lora_linen(CausalLM(config, dtype=jnp.dtype(options.dtype), remat=options.remat))
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


def compiled(options: Any) -> None:
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
        command = [sys.executable, __file__, "compiled", "--case", case]
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


def slope(options: Any) -> None:
    """(temp(2L) - temp(L) - L layers' adapter gradients) / (L · bytes of one carry)."""
    import jax

    from lora_jax.models import ModelConfig

    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    options = argparse.Namespace(**{**vars(options), "dtype": "float32", "chunk": 128})
    rows, seq, few = 1, 512, 16
    carry = rows * seq * config.hidden_size * 4
    print(f"jax {jax.__version__}; temporaries of one more layer in carries, compiled for this CPU")
    print("| base | 16 layers | 32 layers | adapter gradients | slope |\n|---|---|---|---|---|")
    for weights in ("nf4", "float32", "bf16"):
        temporaries, gradients = [], []
        for layers in (few, 2 * few):
            deep = dataclasses.replace(config, num_hidden_layers=layers)
            step, shapes = train_step(deep, weights, rows, seq, options)
            memory = step.lower(*shapes).compile().memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            gradients.append(4 * sum(x.size for x in jax.tree.leaves(shapes[0].trainable)))
        own = gradients[1] - gradients[0]
        share = (temporaries[1] - temporaries[0] - own) / (few * carry)
        print(f"| {weights} | {temporaries[0]:,} | {temporaries[1]:,} | {own:,} | {share:.4f} |")


def loss(options: Any) -> None:
    """Value and gradient by the hidden states, chunked and plain, in an order that alternates."""
    import jax
    import jax.numpy as jnp
    import optax

    from lora_jax.train import next_token_loss

    tokens, width, vocab = 4096, 512, 32000
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width))
    kernel = 0.05 * jax.random.normal(keys[1], (width, vocab))
    ids = jax.random.randint(keys[2], (1, tokens), 0, vocab)

    def plain(hidden: Any, kernel: Any) -> Any:
        logits = hidden[:, :-1] @ kernel
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum()

    def chunked(hidden: Any, kernel: Any) -> Any:
        mask = jnp.ones_like(ids, bool)
        return next_token_loss(lambda h: h @ kernel, hidden, ids, mask, chunk=options.chunk)[0]

    steps: dict[str, Any] = {
        f.__name__: jax.jit(jax.value_and_grad(f)).lower(hidden, kernel).compile()
        for f in (plain, chunked)
    }
    memory = {n: s.memory_analysis().temp_size_in_bytes for n, s in steps.items()}
    found = {n: jax.block_until_ready(s(hidden, kernel)) for n, s in steps.items()}
    expected, got = found["plain"][1], found["chunked"][1]
    worst = jnp.abs(expected - got).max() / jnp.abs(expected).max()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(options.rounds):
        for name in list(steps)[:: 1 if r % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](hidden, kernel))
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(x) for name, x in times.items()}
    ratios = [c / p for c, p in zip(times["chunked"], times["plain"], strict=True)]
    print(f"{tokens} tokens, d {width}, vocabulary {vocab}, float32, chunks of {options.chunk}")
    print("| loss | temporaries, MB | median s |\n|---|---|---|")
    for name in steps:
        print(f"| {name} | {memory[name] / 1e6:.1f} | {median[name]:.3f} |")
    share = memory["chunked"] / memory["plain"]
    print(
        f"\nbytes {share:.4f} of plain; time {statistics.median(ratios):.3f} of plain (median of"
        f" {len(ratios)} rounds); gradients differ by {worst:.1e} of the largest"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["compiled", "slope", "loss"])
    parser.add_argument("--device", choices=["h200", "v5e"])
    parser.add_argument("--base", choices=["nf4", "bf16"])
    parser.add_argument("--tokens", type=int, help="only the cases of so many tokens")
    parser.add_argument("--remat", default="nothing")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = "bfloat16"
    if options.case:
        device, weights, rows, seq = options.case.split(",")
        compile_case(device, weights, int(rows), int(seq), options)
    else:
        {"compiled": compiled, "slope": slope, "loss": loss}[options.part](options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
