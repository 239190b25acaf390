"""How long another adapter takes, and how long another model would.

    PYTHONPATH=. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/serving/swap.py

Milliseconds to the first token of a request whose adapter (a) is loaded from a directory for it,
(b) is known but was pushed off the device, (c) is on the device; and the longest gap between tokens
of four others while adapters are loaded one after another, and as long before, while none is.
Then seconds that a new process takes from its start to a first token of a model of the same shape
without adapters, as a server of merged models would: with its programs compiled anew, and with
them in JAX's persistent cache. The bundled base and a random Llama of 107 million parameters, in
float32 on two threads. Writes `swap_cpu.json`.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
THREADS = 2
if hasattr(os, "sched_setaffinity"):  # before XLA counts its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from experiments.bench.stats import spread  # noqa: E402
from experiments.serving.engine import RANK, adapter  # noqa: E402
from lora_jax.models import (  # noqa: E402
    CausalLM,
    ModelConfig,
    bundled_model,
    load_pretrained,
    save_pretrained,
)
from lora_jax.serve import Engine, Event, Request  # noqa: E402

HERE = Path(__file__).resolve().parent
SLOTS, KNOWN, WINDOW = 2, 4, 0.2
"""Slots, adapters that take turns in them, seconds in which gaps are looked for."""
SIZES: dict[str, int] = dict(max_rows=8, max_length=256, prefill_chunk=64)
WIDTH, LAYERS = 1024, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Another adapter beside another model.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reloads", type=int, default=3)
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        print(json.dumps(from_nothing(options.reload)))
        return
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_larger(Path(folder) / "larger")
        for name, model in {"bundled": bundled_model(), "larger": Path(folder) / "larger"}.items():
            found[name] = swapped(model, options.rounds) | reloaded(model, options.reloads)
            print(name, json.dumps(found[name], indent=1), flush=True)
    found["load_after"] = os.getloadavg()[0]
    (HERE / "swap_cpu.json").write_text(json.dumps(found, indent=1) + "\n")


def write_larger(directory: Path) -> None:
    """A Llama that knows nothing, with the bundled tokenizer."""
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
    )
    params = CausalLM(config).init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    save_pretrained(directory, params, config, dtype="float32")
    for file in bundled_model().glob("tokenizer*"):
        shutil.copy(file, directory)


def swapped(model: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds to a first token, and gaps of others meanwhile."""
    base = load_pretrained(model)
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(base, adapter_slots=SLOTS, max_rank=RANK, **SIZES) as engine,
    ):
        directories = [adapter(base, Path(folder) / str(i), i) for i in range(KNOWN)]
        turns = itertools.cycle(directories)

        def first_token(name: str | None) -> None:
            start = next(numbers) % 4000
            prompt = [start + i for i in range(16)]  # which nobody has read before
            list(engine.submit(Request(prompt, adapter=name, max_new_tokens=1, stop_ids=())))

        def fresh() -> None:
            engine.load_adapter("fresh", next(turns))
            first_token("fresh")

        first = {"fresh_ms": [timed(fresh) for _ in range(rounds + 1)][1:]}
        engine.unload_adapter("fresh")
        for i in range(KNOWN):
            engine.load_adapter(str(i), directories[i])
        names = itertools.cycle([str(i) for i in range(KNOWN)])
        # The one that was asked for longest ago, and then once more.
        turn = [
            [timed(functools.partial(first_token, name)) for _ in range(2)]
            for name in itertools.islice(names, rounds + KNOWN)
        ][KNOWN:]
        first |= {"pushed_off_ms": [a for a, _ in turn], "on_device_ms": [b for _, b in turn]}
        pairs = [gaps(engine, directories) for _ in range(rounds + 1)][1:]
    first |= {"quiet_gap_ms": [a for a, _ in pairs], "loading_gap_ms": [b for _, b in pairs]}
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"file_bytes": size} | {name: spread(values) for name, values in first.items()}


def timed(act: Callable[[], None]) -> float:
    start = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - start)


def gaps(engine: Engine, directories: list[Path]) -> tuple[float, float]:
    """The longest time between tokens of four texts, alone and while adapters are loaded."""
    times: list[float] = []

    def note(_: Event) -> None:
        times.append(time.perf_counter())

    prompts = [[7 + i, *range(20, 30)] for i in range(4)]
    tickets = [
        engine.submit(Request(prompt, max_new_tokens=240, stop_ids=()), note) for prompt in prompts
    ]
    while len(times) < 40:
        time.sleep(0.001)
    marks = [time.perf_counter()]
    time.sleep(WINDOW)
    marks.append(time.perf_counter())
    for directory in itertools.cycle(directories):
        engine.load_adapter("gap", directory)
        if time.perf_counter() > marks[1] + WINDOW:
            break
    marks.append(time.perf_counter())
    assert engine.stats.running == len(prompts), "the texts ended too early"
    while times[-1] < marks[-1]:  # the last gap ends, too
        time.sleep(0.001)
    for ticket in tickets:
        ticket.cancel()
    engine.unload_adapter("gap")
    quiet, loading = (longest(times, *window) for window in itertools.pairwise(marks))
    return quiet, loading


def longest(times: list[float], start: float, end: float) -> float:
    """Milliseconds of the longest gap that lies in a window, or partly."""
    near = [(a, b) for a, b in itertools.pairwise(times) if b >= start and a <= end]
    return 1e3 * max(b - a for a, b in near)


def reloaded(model: Path, rounds: int) -> dict[str, Any]:
    """Seconds of new processes, in turn with an empty cache and with what that left."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind, runs in found.items():
                start = time.perf_counter()
                run = subprocess.run(
                    [sys.executable, __file__, "--reload", str(model)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | cached_in(cache),
                )
                taken = json.loads(run.stdout.splitlines()[-1])
                runs.append(taken | {"process": time.perf_counter() - start})
                print(kind, runs[-1], flush=True)
    return {
        f"reload_{kind}_s": {part: spread([run[part] for run in runs]) for part in runs[0]}
        for kind, runs in found.items()
    }


def cached_in(directory: str) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": directory,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def from_nothing(model: str) -> dict[str, float]:
    """Seconds from a model's directory to its first token, imports apart."""
    marks = [time.perf_counter()]
    base = load_pretrained(model)
    jax.block_until_ready(base.params)
    marks.append(time.perf_counter())
    with Engine(base, adapter_slots=0, **SIZES) as engine:
        marks.append(time.perf_counter())
        list(engine.submit(Request(list(range(16)), max_new_tokens=1, stop_ids=())))
        marks.append(time.perf_counter())
    parts = ("weights", "programs", "first_token")
    taken = [after - before for before, after in itertools.pairwise(marks)]
    return dict(zip(parts, taken, strict=True)) | {"whole": sum(taken)}


if __name__ == "__main__":
    main()
