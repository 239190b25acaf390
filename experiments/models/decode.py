"""Generating with lora_jax and with transformers, in turn in one process.

    python experiments/models/decode.py [--rounds 7]

A random Llama of 30 million parameters (8 layers, d 512) in float32 on two threads: prompts of 64
tokens, 128 new ones, greedily, at batch 1 and 8; then sampled with top-p by lora_jax alone. Both
have the same weights and have to write the same text. Writes `decode_cpu.json`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
THREADS = 2
if hasattr(os, "sched_setaffinity"):  # before either library counts its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from lora_jax.models import Pretrained, generate, load_pretrained  # noqa: E402

HERE = Path(__file__).resolve().parent
SHAPE = dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.1,
)  # fmt: skip
PROMPT, NEW = 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(description="Generating on two threads.")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    theirs, ours = models()
    found: dict[str, Any] = {
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "rows": [],
    }
    before = len(compiled)
    for batch in (1, 8):
        found["rows"].append(measured(theirs, ours, batch, options.rounds))
        print(json.dumps(found["rows"][-1]), flush=True)
    found["compilations"] = len(compiled) - before
    found["load_after"] = os.getloadavg()[0]
    print(f"{found['compilations']} compilations")
    text = json.dumps(found, indent=1) + "\n"
    (HERE / "decode_cpu.json").write_text(text, encoding="utf-8")


def models() -> tuple[Any, Pretrained]:
    """The same random weights in both."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return theirs, load_pretrained(directory)


def measured(theirs: Any, ours: Pretrained, batch: int, rounds: int) -> dict[str, Any]:
    prompts = np.random.default_rng(batch).integers(0, SHAPE["vocab_size"], (batch, PROMPT))
    ids = torch.from_numpy(prompts)

    def by_transformers() -> list[list[int]]:
        with torch.no_grad():
            whole = theirs.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return whole[:, PROMPT:].tolist()

    def by_lora_jax(**sampling: Any) -> list[list[int]]:
        rows = prompts.tolist()
        return generate(ours.module, ours.params, rows, max_new_tokens=NEW, **sampling)

    runs: dict[str, Callable[[], list[list[int]]]] = {
        "transformers": by_transformers,
        "lora_jax": by_lora_jax,
        "lora_jax_sampled": lambda: by_lora_jax(temperature=1.0, top_p=0.9, seed=0),
    }
    same = np.mean(np.asarray(runs["transformers"]()) == np.asarray(runs["lora_jax"]()))
    runs["lora_jax_sampled"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    result: dict[str, Any] = {"batch": batch, "rounds": rounds, "same_tokens": float(same)}
    for name, seconds in times.items():
        result[f"{name}_tokens_per_second"] = spread([batch * NEW / s for s in seconds])
    pairs = zip(times["transformers"], times["lora_jax"], strict=True)
    result["times_faster"] = spread([slow / fast for slow, fast in pairs])
    return result


def spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


if __name__ == "__main__":
    main()
