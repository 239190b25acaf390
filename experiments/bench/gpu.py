"""How lora_jax stands on the GPU that JAX finds, beside PEFT and bitsandbytes on the same card.

    python experiments/bench/gpu.py [gpu_train] [gpu_read] [--remat POLICY] [--steps 24]
                                    [--passes 2] [--only CASE ...] [--small] [--device gpu|cpu]

An 8B shape in bfloat16.  A card holds one such model at a time, so the cases run one after the
other in fresh processes, in passes of alternating order; what is measured is written at once.
`--small --device cpu` tries the code.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import measure
import plot
from run import RESULTS, TRIALS, result_of, told
from workloads import GPU_READ_ROWS, GPU_TRAIN_ROWS, SMALL_BLOCK, Entry, Workload

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
FULL = {"shape": LLAMA_8B, "batch": 2, "seq": 4096, "rank": 16, "alpha": 32,
        "matrix": [8, 4096, 14336], "repeats": 10, "new_tokens": 256}  # fmt: skip
SMALL = {"shape": SMALL_BLOCK, "batch": 2, "seq": 64, "rank": 4, "alpha": 8,
         "matrix": [2, 128, 256], "repeats": 2, "new_tokens": 8}  # fmt: skip
GATE = {"batch": 1, "seq": 512}
GATE_SHAPE = {"num_hidden_layers": 2, "vocab_size": 8192}
FALL_TOLERANCE = 1e-2
"""Relative difference of how far the losses fall in a step of bfloat16."""

TRAIN = Workload(
    "gpu_train", "Training steps of an 8B shape on one GPU", "gpu", FULL, SMALL,
    (
        Entry("lora", "cases_gpu", "lora", "lora_jax LoRA, bf16", "adapter"),
        Entry("nf4", "cases_gpu", "nf4", "lora_jax QLoRA, NF4", "nf4"),
        Entry("peft", "cases_gpu_torch", "peft", "PEFT, bf16, checkpointing", "adapter", peer=True),
        Entry("bnb", "cases_gpu_torch", "bnb", "PEFT + bitsandbytes NF4, checkpointing", "nf4",
              peer=True),
        Entry("dora", "cases_gpu", "dora", "lora_jax DoRA, bf16"),
        Entry("nf4_least", "cases_gpu", "nf4_least", "lora_jax QLoRA, blocks recomputed"),
    ),
    GPU_TRAIN_ROWS, 24, "tokens_per_s",
)  # fmt: skip
READ = Workload(
    "gpu_read", "Four bits and decoding of an 8B shape on one GPU", "gpu", FULL, SMALL,
    (
        Entry("dequantize", "cases_gpu", "dequantize", "lora_jax NF4 to bf16"),
        Entry("dequantize_bnb", "cases_gpu_torch", "dequantize", "bitsandbytes NF4 to bf16",
              peer=True),
        Entry("decode", "cases_gpu", "decode", "lora_jax decode, bf16"),
        Entry("decode_nf4", "cases_gpu", "decode_nf4", "lora_jax decode, NF4"),
    ),
    GPU_READ_ROWS, 24, "tokens_per_s",
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in (TRAIN, READ)}


def main() -> int:
    options = arguments()
    platform, card = accelerator(options.device)
    if platform != options.device:
        print(f"no GPU that JAX can use (it finds {platform or 'nothing'}): nothing measured")
        return 0
    failed = [name for name in options.workloads if not measured(WORKLOADS[name], options, card)]
    return 1 if failed else 0


def measured(workload: Workload, options: argparse.Namespace, card: str) -> bool:
    """Whether all of a workload could be measured; what could be is written."""
    run = run_of(workload, options)
    before = machine.wait_for_quiet(0.0 if options.small else 10.0)
    save = functools.partial(written, run, options, before, card)
    try:
        gate(run)
        samples = passes(run, options.passes, save)
    except (measure.GateError, measure.CaseError) as error:
        print(f"{workload.name}: stopped: {error}", file=sys.stderr)
        return False
    result, out = save(samples)
    plot.draw(result, out / f"{workload.name}.png")
    told(result)
    return True


def written(
    run: measure.Run,
    options: argparse.Namespace,
    before: dict[str, Any],
    card: str,
    samples: measure.Samples,
) -> tuple[dict[str, Any], Path]:
    """What has been measured, and the folder where it now stands."""
    result = result_of(run, samples, dict(before), options.small)
    result["hardware"]["accelerator"] = card
    out = options.out or (TRIALS if options.small else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{run.workload.name}.json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
    )
    return result, out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lora_jax against its peers, on a GPU.")
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--remat", default="everything", help="what our backward pass keeps")
    parser.add_argument("--steps", type=int, default=24, help="timed steps in all passes")
    parser.add_argument("--passes", type=int, default=2, help="fresh processes of each case")
    parser.add_argument("--small", action="store_true", help="tiny shapes, 4 steps: a trial")
    cases = [entry.key for workload in WORKLOADS.values() for entry in workload.entries]
    parser.add_argument("--only", nargs="*", choices=cases, help="these cases")
    parser.add_argument("--out", type=Path, help="where results are written")
    options = parser.parse_args()
    options.workloads = options.workloads or list(WORKLOADS)
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu only with --small: an 8B step takes hours there")
    if not 1 <= options.passes <= (steps := 4 if options.small else options.steps):
        parser.error(f"--passes must be in 1..{steps}, got {options.passes}")
    return options


def accelerator(wanted: str) -> tuple[str, str]:
    """Platform and name of the device that JAX finds, asked in a process of its own."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"
    asked = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | jax_env(wanted),
        check=False,
    )
    platform, card = asked.stdout.split("\n")[:2] if asked.returncode == 0 else ("", "")
    return platform, card


def jax_env(device: str) -> dict[str, str]:
    """Memory as it is needed, so that its peak can be read."""
    more = {"JAX_PLATFORMS": "cpu"} if device == "cpu" else {}
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **more}


def run_of(workload: Workload, options: argparse.Namespace) -> measure.Run:
    spec: dict[str, Any] = dict(SMALL if options.small else FULL)
    spec |= {"device": options.device, "remat": options.remat, "env": jax_env(options.device)}
    steps = 4 if options.small else options.steps
    run = measure.Run(workload, spec, steps, len(os.sched_getaffinity(0)))
    for entry in workload.entries:
        if options.only and entry.key not in options.only:
            run.left_out[entry.key] = "not asked for"
    return run


def gate(run: measure.Run) -> None:
    """The losses of a few layers of the same width and fewer words, from the same files."""
    full, shape = run.spec, run.spec["shape"]
    few = {name: min(size, shape[name]) for name, size in GATE_SHAPE.items()}
    gated = full | GATE | {"shape": shape | few}
    built = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        run.spec = gated | {"dir": directory}
        prepare = Entry("prepare", "cases_gpu", "prepare", "prepare")
        # In turn: side by side, one of them was seen to take 105 GB of a card.
        asked = [e for e in run.workload.entries if e.group and e.key not in run.left_out]
        for entry in (prepare, *asked) if asked else ():
            answer = alone(run, entry, lambda child: child.ask("build", gate=2))
            if answer is not None and entry is not prepare:
                built[entry.key] = answer
    run.spec = full
    measure.check(run, {k: x | {"losses": x["losses"][:1]} for k, x in built.items()})
    # Adam's first step moves every number by the sign of its gradient, and bfloat16 decides some
    # signs by its rounding: how far the loss falls is less exact than where it begins.
    falls = {k: x | {"losses": [x["losses"][0] - x["losses"][1]]} for k, x in built.items()}
    measure.check(run, falls, FALL_TOLERANCE)


def alone(run: measure.Run, entry: Entry, use: Any) -> Any:
    """What `use` makes of a fresh child; None where a peer does not run."""
    child = run.child(entry)
    try:
        return use(child)
    except measure.CaseError as error:
        run.leave_out(entry, error)
    finally:
        child.close()


def passes(run: measure.Run, count: int, save: Any) -> measure.Samples:
    """Every case alone on the card, now in this order and now in the other."""
    samples: measure.Samples = {}
    for turn in range(count):
        for entry in run.workload.entries[:: 1 if turn % 2 == 0 else -1]:
            if entry.key in run.left_out:
                continue
            found = alone(run, entry, lambda child: timed(child, run.rounds // count))
            if found is not None:
                measure.say(f"measured: {entry.label}")
                for metric, values in found.items():
                    samples.setdefault(entry.key, {}).setdefault(metric, []).extend(values)
                save({key: x for key, x in samples.items() if key not in run.left_out})
    return {key: x for key, x in samples.items() if key not in run.left_out}


def timed(child: measure.Child, steps: int) -> dict[str, list[float]]:
    """Seconds and speed of each step after three that warm up, and peak memory."""
    amount = child.ask("build", gate=3)["facts"]["amount"]
    times = [child.ask("step") for _ in range(steps)]
    memory = child.ask("memory")
    found = {
        "wall": [wall for wall, _ in times],
        "cpu": [cpu for _, cpu in times],
        "tokens_per_s": [amount / wall for wall, _ in times],
        "terabytes_per_s": [amount / wall / 1e12 for wall, _ in times],
    }
    del found["tokens_per_s" if "dequantize" in child.name else "terabytes_per_s"]
    return found | ({"peak_device": [memory["device"]]} if "device" in memory else {})


if __name__ == "__main__":
    sys.exit(main())
