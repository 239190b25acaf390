"""Many adapters in one batch: our engine beside transformers with PEFT.

    PYTHONPATH=. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/serving/peers.py

The bundled base in float32 on two threads, 8 adapters of rank 16 that `save_adapter` wrote and
PEFT reads. PEFT answers a batch through `generate(adapter_names=...)`, 16 requests at a time in
the order they came, padded on the left, until the longest answer is done. Both have to write the
same greedy tokens before anything is timed; then they take turns in one process, with prompts that
are new in each round; PEFT once more with one thread, since small products gain little from a
second. Neither loading nor compiling is timed. Writes `peers_cpu.json`.
"""

import argparse
import dataclasses
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of torch that spin while they wait stand still where others want the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
THREADS = 2
if hasattr(os, "sched_setaffinity"):  # before either library counts its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from experiments.bench.stats import ratio, rotated, spread  # noqa: E402
from experiments.serving.engine import adapter  # noqa: E402
from lora_jax.models import Pretrained, bundled_model, load_pretrained  # noqa: E402
from lora_jax.serve import Engine, Request  # noqa: E402

HERE = Path(__file__).resolve().parent
ROWS, RANK, LONGEST, PAUSE = 16, 16, 384, 0.1
"""Requests in flight, rank, tokens of a request at most, seconds in which threads go to sleep."""
NAMES = [f"adapter_{i}" for i in range(8)]
TIE = 1e-4
"""Two best logits nearer than this may come out in either order."""
Tokens = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, the length of its answer, and the adapter it goes through."""

    prompt: list[int]
    new: int
    name: str


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine beside PEFT on two threads.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    base = load_pretrained(bundled_model())
    found: dict[str, Any] = {
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, peft)},
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "rounds": rounds,
    }
    sizes = dict(max_rows=ROWS, max_length=LONGEST, prefill_chunk=128)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(base, adapter_slots=len(NAMES), max_rank=RANK, **sizes) as engine,
    ):
        directories = [adapter(base, Path(folder) / n, i) for i, n in enumerate(NAMES)]
        for name, directory in zip(NAMES, directories, strict=True):
            engine.load_adapter(name, directory)
        theirs = peft_model(base, directories)
        for name, load in {"equal": equal, "unequal": unequal}.items():
            found[name] = compared(engine, theirs, load, source(base), rounds)
            print(name, json.dumps(found[name], indent=1), flush=True)
        found["reused_tokens"] = engine.stats.reused_tokens
    (HERE / "peers_cpu.json").write_text(json.dumps(found, indent=1) + "\n")


def peft_model(base: Pretrained, directories: Sequence[Path]) -> Any:
    """The same base in torch, checked weight by weight, with the same adapters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, base.params["model"]["embed_tokens"]["embedding"])
    adapted = peft.PeftModel.from_pretrained(model, directories[0], adapter_name=NAMES[0])
    for name, directory in zip(NAMES[1:], directories[1:], strict=True):
        adapted.load_adapter(directory, adapter_name=name)
    return adapted.eval()


def source(base: Pretrained) -> list[int]:
    """Tokens of real text, of which prompts are cut."""
    return base.tokenizer.encode(inspect.getsource(argparse))


def equal(ids: Sequence[int], turn: int) -> list[Asked]:
    """All at once and of one length: the best case of a batch that does not change."""
    starts = np.random.default_rng([0, turn]).integers(0, len(ids) - 24, ROWS)
    return [Asked(list(ids[s : s + 24]), 64, NAMES[i % 8]) for i, s in enumerate(starts)]


def unequal(ids: Sequence[int], turn: int) -> list[Asked]:
    """Four times as many, of every length."""
    rng = np.random.default_rng([1, turn])
    lengths, news = rng.integers(8, 201, 4 * ROWS), rng.integers(8, 129, 4 * ROWS)
    starts = rng.integers(0, len(ids) - 200, 4 * ROWS)
    each = enumerate(zip(starts, lengths, news, strict=True))
    return [Asked(list(ids[s : s + n]), int(new), NAMES[i % 8]) for i, (s, n, new) in each]


def compared(
    engine: Engine,
    theirs: Any,
    load: Callable[[Sequence[int], int], list[Asked]],
    ids: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    ways: dict[str, Callable[[list[Asked]], Tokens]] = {
        "lora_jax": lambda asked: by_engine(engine, asked),
        "peft": lambda asked: by_peft(theirs, asked, THREADS),
        "peft_one_thread": lambda asked: by_peft(theirs, asked, 1),
    }
    first = load(ids, 0)
    same = agreement(ways["lora_jax"](first), ways["peft"](first), first, theirs)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, rounds + 1):
        asked = load(ids, turn)
        for name in rotated(list(ways), turn):
            time.sleep(PAUSE)
            start = time.perf_counter()
            ways[name](asked)
            seconds[name].append(time.perf_counter() - start)
    # Every load of one kind has about as many tokens; a ratio is of one and the same.
    count = [sum(x.new for x in load(ids, turn)) for turn in range(1, rounds + 1)]
    speeds = {name: [n / s for n, s in zip(count, of, strict=True)] for name, of in seconds.items()}
    return {
        "same_tokens": same,
        "tokens_per_second": {name: spread(of) for name, of in speeds.items()},
        "times_faster": {
            name: ratio(speeds["lora_jax"], of) for name, of in speeds.items() if name != "lora_jax"
        },
    }


def by_engine(engine: Engine, asked: Sequence[Asked]) -> Tokens:
    tickets = [
        engine.submit(Request(x.prompt, adapter=x.name, max_new_tokens=x.new, stop_ids=()))
        for x in asked
    ]
    for ticket in tickets:
        list(ticket)
    return [list(ticket.completion.tokens) for ticket in tickets]


@torch.inference_mode()
def by_peft(model: Any, asked: Sequence[Asked], threads: int) -> Tokens:
    """Batches in the order of arrival, each until its longest answer is done."""
    torch.set_num_threads(threads)
    texts: Tokens = []
    for at in range(0, len(asked), ROWS):
        batch = asked[at : at + ROWS]
        width, new = max(len(x.prompt) for x in batch), max(x.new for x in batch)
        ids, mask = (torch.zeros(len(batch), width, dtype=torch.long) for _ in "im")
        for row, x in enumerate(batch):
            ids[row, width - len(x.prompt) :] = torch.tensor(x.prompt)
            mask[row, width - len(x.prompt) :] = 1
        whole = model.generate(
            input_ids=ids, attention_mask=mask, adapter_names=[x.name for x in batch],
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        texts += [row[width:][: x.new] for row, x in zip(whole.tolist(), batch, strict=True)]
    return texts


def agreement(ours: Tokens, theirs: Tokens, asked: Sequence[Asked], model: Any) -> float:
    """The share of texts that are the same; stops where a difference is no tie."""
    same = 0
    for a, b, x in zip(ours, theirs, asked, strict=True):
        assert len(a) == len(b) == x.new
        at = next((i for i in range(x.new) if a[i] != b[i]), None)
        if at is None:
            same += 1
            continue
        with torch.inference_mode():
            ids = torch.tensor([x.prompt + a[:at]])
            logits = model(input_ids=ids, adapter_names=[x.name]).logits[0, -1]
        gap = float(abs(logits[a[at]] - logits[b[at]]))
        if gap > TIE:
            raise SystemExit(f"not the same work: {x.name} differs at {at} by {gap:g}")
    return same / len(asked)


if __name__ == "__main__":
    main()
