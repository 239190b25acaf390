"""What a shared batch, many adapters and prompts in chunks cost and give.

    PYTHONPATH=. python experiments/serving/engine.py [--rounds 9]

The bundled base on two threads; whatever is compared takes turns in one process, and a ratio is the
median over rounds with its quartiles.  Writes `engine_cpu.json`.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
THREADS = 2
if hasattr(os, "sched_setaffinity"):  # before XLA counts its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402

from experiments.bench.stats import ratio, spread  # noqa: E402
from lora_jax import LoraConfig, init_adapter  # noqa: E402
from lora_jax.adapters import save_adapter  # noqa: E402
from lora_jax.models import Pretrained, bundled_model, generate, load_pretrained  # noqa: E402
from lora_jax.serve import Engine, Event, Request, Ticket  # noqa: E402

HERE = Path(__file__).resolve().parent
ROWS, PROMPT, NEW, ADAPTERS, RANK, LOWER = 16, 24, 64, 8, 16, 8
LONG, CHUNKS = 384, (32, 64, 128, 384)
NAMES = [f"adapter {i}" for i in range(ADAPTERS)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine on two threads.")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    base = load_pretrained(bundled_model())
    ids = base.tokenizer.encode(inspect.getsource(argparse))
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        **throughput(base, ids, rounds),
        "chunks": [chunked(base, ids, chunk, rounds) for chunk in CHUNKS],
    }
    (HERE / "engine_cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def throughput(base: Pretrained, ids: Sequence[int], rounds: int) -> dict[str, Any]:
    """Tokens per second of 16 requests, in a crowd and one after another."""
    with contextlib.ExitStack() as stack:
        adapted, lower = (stack.enter_context(adapted_engine(base, rank)) for rank in (RANK, LOWER))
        plain = stack.enter_context(engine(base, 0, RANK))
        ways: dict[str, Callable[[], float]] = {
            "together": lambda: together(adapted, ids, [None]),
            "one at a time": lambda: one_by_one(adapted, ids),
            "eight adapters": lambda: together(adapted, ids, NAMES),
            "eight adapters of rank 8": lambda: together(lower, ids, NAMES),
            "together, no slots": lambda: together(plain, ids, [None]),
            "one at a time, no slots": lambda: one_by_one(plain, ids),
            "generate, one at a time": lambda: generated(base, ids),
        }
        speeds = in_turn(ways, rounds)
    return {
        "tokens_per_second": {way: statistics.median(of) for way, of in speeds.items()},
        "together_over_one_at_a_time": ratio(speeds["together"], speeds["one at a time"]),
        "together_over_one_at_a_time_no_slots": ratio(
            speeds["together, no slots"], speeds["one at a time, no slots"]
        ),
        "one_at_a_time_no_slots_over_generate": ratio(
            speeds["one at a time, no slots"], speeds["generate, one at a time"]
        ),
        "eight_adapters_over_base_rows": ratio(speeds["eight adapters"], speeds["together"]),
        "eight_adapters_over_no_slots": ratio(
            speeds["eight adapters"], speeds["together, no slots"]
        ),
        "eight_adapters_of_rank_8_over_no_slots": ratio(
            speeds["eight adapters of rank 8"], speeds["together, no slots"]
        ),
        "plain_rows_over_no_slots": ratio(speeds["together"], speeds["together, no slots"]),
    }


def chunked(base: Pretrained, ids: Sequence[int], chunk: int, rounds: int) -> dict[str, Any]:
    """How long a long prompt waits for its first token, and the longest gap it makes for others."""
    sizes = dict(max_rows=ROWS, max_length=512, prefill_chunk=chunk, adapter_slots=0)
    with Engine(base, **sizes) as running:
        late_and_gap(running, ids, 0)
        pairs = [late_and_gap(running, ids, turn) for turn in range(1, rounds + 1)]
    waits, gaps = ([1e3 * pair[i] for pair in pairs] for i in (0, 1))
    return {"chunk": chunk, "first_token_ms": spread(waits), "longest_gap_ms": spread(gaps)}


def late_and_gap(running: Engine, ids: Sequence[int], turn: int) -> tuple[float, float]:
    """Seconds to the first token of a long prompt, and the longest between others' tokens then."""
    times: list[float] = []

    def note(_: Event) -> None:
        times.append(time.perf_counter())

    tickets = [running.submit(request(ids, i, None, 120), note) for i in range(4)]
    while len(times) < 40:
        time.sleep(0.001)
    start = time.perf_counter()
    list(running.submit(Request(ids[turn:][:LONG], max_new_tokens=1, stop_ids=())))
    end = time.perf_counter()
    for ticket in tickets:
        list(ticket)
    near = [t for t in times if start - 0.05 <= t <= end + 0.05]
    return end - start, max(after - before for before, after in itertools.pairwise(near))


@contextlib.contextmanager
def adapted_engine(base: Pretrained, rank: int) -> Iterator[Engine]:
    """An engine with slots for eight adapters, and those in them."""
    with tempfile.TemporaryDirectory() as folder, engine(base, ADAPTERS, rank) as made:
        for seed, name in enumerate(NAMES):
            made.load_adapter(name, adapter(base, Path(folder) / name, seed, rank))
        yield made


def engine(base: Pretrained, slots: int, rank: int) -> Engine:
    return Engine(
        base, max_rows=ROWS, max_length=128, prefill_chunk=128, adapter_slots=slots, max_rank=rank
    )


def adapter(base: Pretrained, directory: Path, seed: int, rank: int = RANK) -> Path:
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    tree = init_adapter(jax.random.key(seed), base.params, config, layouts=base.layouts)
    save_adapter(directory, tree, config, layouts=base.layouts)
    return directory


def request(ids: Sequence[int], i: int, name: str | None, new: int = NEW) -> Request:
    prompt = ids[PROMPT * i :][:PROMPT]
    return Request(prompt, adapter=name, max_new_tokens=new, stop_ids=())


def together(running: Engine, ids: Sequence[int], names: Sequence[str | None]) -> float:
    def ask(i: int) -> Ticket:
        return running.submit(request(ids, i, names[i % len(names)]))

    start = time.perf_counter()
    tickets = [ask(i) for i in range(ROWS)]
    count = sum(len(list(ticket)) for ticket in tickets)
    return count / (time.perf_counter() - start)


def one_by_one(running: Engine, ids: Sequence[int]) -> float:
    start = time.perf_counter()
    count = sum(len(list(running.submit(request(ids, i, None)))) for i in range(ROWS))
    return count / (time.perf_counter() - start)


def generated(base: Pretrained, ids: Sequence[int]) -> float:
    start = time.perf_counter()
    for i in range(ROWS):
        generate(base.module, base.params, [request(ids, i, None).prompt], max_new_tokens=NEW)
    return ROWS * NEW / (time.perf_counter() - start)


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each way once to begin with, then all of them in each round."""
    for way in ways.values():
        way()
    turns = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in ways}


if __name__ == "__main__":
    main()
