"""A load on a server: how fast it answers, and whether what it says stays right.

    PYTHONPATH=. python experiments/serving/load.py                      # starts a server itself
    PYTHONPATH=. python experiments/serving/load.py --faults             # and makes its life hard
    PYTHONPATH=. python experiments/serving/load.py --url http://127.0.0.1:8000

Streams completions from every model that `/v1/models` names, some at a time, and reports tokens
per second, the time to the first token and that between pieces. With `--faults` clients hang up,
send what is no request, or prompts that are too long, while adapters are loaded, asked, unloaded
under their requests and loaded again. Then it has to hold that

- every greedy answer is the one that the same server gave to the same request alone;
- no status is 5xx but 503, and what is wrong is refused with 4xx;
- no row is in use at the end;
- the server's memory is no more than `--growth` above what it was after a third of the requests.

A line says what does not, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import functools
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.serving.server import Client, Heard, Server  # noqa: E402

TIE = 1e-3
"""A request is left out where two best log-probabilities are nearer: either may come out."""
WORDS = ("the", "one", "returns", "a", "list", "of", "all", "names", "in", "it", "and", "raises")
FAULTS = {"answer": 12, "hang up": 4, "malformed": 2, "oversized": 1}
"""How often each kind of request is drawn."""
MALFORMED = (b"", b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "max_tokens": -1}', b"\xff\xfe")


def main() -> None:
    parser = argparse.ArgumentParser(description="A load on a server of many adapters.")
    parser.add_argument("--url", help="of a server that runs (default: start one)")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", help="of the server that is started (default: the bundled base)")
    parser.add_argument("--adapters", type=int, default=8, help="that it is given")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument("--words", type=int, default=40, help="of a prompt at most")
    parser.add_argument("--growth", type=float, default=0.05, help="of memory that is allowed")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--output", help="a JSON file for what was found")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            url = stack.enter_context(started(options.model, options.adapters))
        found, broken = Load(Client(url, options.key), options).run()
    print(json.dumps(found, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(bool(broken))


@contextlib.contextmanager
def started(model: str | None, adapters: int) -> Iterator[str]:
    """A server with adapters of its own making, which clients may load too."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from experiments.serving.engine import adapter
    from lora_jax.models import bundled_model, load_pretrained

    directory = model or str(bundled_model())
    base = load_pretrained(directory)
    with tempfile.TemporaryDirectory() as folder:
        made = [adapter(base, Path(folder) / f"a{i}", i) for i in range(adapters)]
        words = [word for d in made for word in ("--adapter", f"{d.name}={d}")]
        with Server([directory, *words, "--adapter-root", folder]) as server:
            yield server.url


class Load:
    """One run against one server."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client, self._options = client, options
        self._random = random.Random(0)
        self._broken: list[str] = []
        self._statuses: collections.Counter[str] = collections.Counter()
        self._heard: list[Heard] = []
        self._left = options.requests
        self._third: float | None = None
        self._lock = threading.Lock()

    def run(self) -> tuple[dict[str, Any], list[str]]:
        options = self._options
        cards = self._client.get("/v1/models")["data"]
        self._parents = {card["id"]: card["parent"] for card in cards}
        asked = [self._ask() for _ in range(max(options.at_once, 4 * len(self._parents)))]
        self._alone = [(body, answer) for body in asked if (answer := self._by_itself(body))]
        start, over = time.perf_counter(), threading.Event()
        with ThreadPoolExecutor(options.at_once + 1) as pool:
            visitor = pool.submit(self._visit, over) if options.faults else None
            workers = [pool.submit(self._work, seed) for seed in range(options.at_once)]
            for worker in workers:
                worker.result()
            seconds = time.perf_counter() - start
            over.set()
            visits = visitor.result() if visitor else 0
        self._settle()
        return self._found(seconds, visits), self._broken

    def _ask(self) -> dict[str, Any]:
        """A request; half of the prompts begin alike."""
        draw, options = self._random, self._options
        words = draw.choices(WORDS, k=draw.randint(4, options.words))
        shared = "def names(self):\n    # " if draw.random() < 0.5 else ""
        return {
            "model": draw.choice(list(self._parents)),
            "prompt": shared + " ".join(words),
            "max_tokens": draw.randint(4, options.new),
            "temperature": 0,
        }

    def _by_itself(self, body: dict[str, Any]) -> str | None:
        """What a request is answered alone; None where rounding may change it."""
        status, raw = self._client.post("/v1/completions", body | {"logprobs": 2})
        if status != 200:
            raise SystemExit(f"refused alone with {status}: {raw[:200]!r}")
        choice = json.loads(raw)["choices"][0]
        best = [sorted(place.values()) for place in choice["logprobs"]["top_logprobs"]]
        tie = any(values[-1] - values[-2] < TIE for values in best if len(values) > 1)
        return None if tie else choice["text"]

    def _work(self, seed: int) -> None:
        draw = random.Random(1 + seed)
        kinds = FAULTS if self._options.faults else {"answer": 1}
        while self._take():
            kind = draw.choices(list(kinds), list(kinds.values()))[0]
            body, expected = draw.choice(self._alone)
            try:
                self._do(kind, body, expected, draw)
            except (OSError, http.client.HTTPException) as error:
                self._break(f"{kind}: {type(error).__name__}: {error}")

    def _take(self) -> bool:
        """Whether there is one more to send; memory is looked at after a third of them."""
        with self._lock:
            self._left -= 1
            if self._left == self._options.requests * 2 // 3:
                self._third = self._client.metrics()["process_resident_memory_bytes"]
            return self._left >= 0

    def _do(self, kind: str, body: dict[str, Any], expected: str, draw: random.Random) -> None:
        if kind == "answer":
            self._check(self._client.stream(body), expected, body["model"])
        elif kind == "hang up":
            # At once, or after the first pieces.
            self._note(kind, self._client.stream(body, leave_after=draw.randint(0, 3)).status)
        elif kind == "malformed":
            self._refused(kind, draw.choice(MALFORMED))
        else:
            self._refused(kind, body | {"prompt": "one more " * draw.choice([5_000, 500_000])})

    def _refused(self, kind: str, body: Any) -> None:
        status, raw = self._client.post("/v1/completions", body)
        self._note(kind, status)
        if not 400 <= status < 500:
            self._break(f"{kind}: status {status} where 4xx was due: {raw[:200]!r}")

    def _check(self, heard: Heard, expected: str, model: str) -> None:
        self._note("answer", heard.status)
        if heard.status == 503:
            return
        if heard.error or heard.status != 200:
            self._break(f"{model}: status {heard.status}: {heard.error}")
        elif heard.text != expected:
            self._break(f"{model}: said {heard.text!r} and alone {expected!r}")
        else:
            with self._lock:
                self._heard.append(heard)

    def _visit(self, over: threading.Event) -> int:
        """Load adapters under other names, ask them, and unload them while they answer."""
        adapters = [name for name, parent in self._parents.items() if parent is not None]
        known = [(body, text) for body, text in self._alone if body["model"] in adapters]
        visits = 0
        while known and not over.is_set():
            body, text = known[visits % len(known)]
            visits += 1
            guest = {"lora_name": f"guest {visits}", "lora_path": body["model"]}
            status, raw = self._client.post("/v1/load_lora_adapter", guest)
            self._note("load", status)
            if status != 200:
                self._break(f"load: status {status}: {raw[:200]!r}")
                break
            unload = functools.partial(self._unload, guest["lora_name"])
            heard = self._client.stream(body | {"model": guest["lora_name"]}, on_first=unload)
            self._check(heard, text, guest["lora_name"])
        return visits

    def _unload(self, name: str) -> None:
        status, raw = self._client.post("/v1/unload_lora_adapter", {"lora_name": name})
        self._note("unload", status)
        if status != 200:
            self._break(f"unload: status {status}: {raw[:200]!r}")

    def _settle(self) -> None:
        """Whether the server comes to rest, and how much memory it holds then."""
        for _ in range(100):
            now = self._client.metrics()
            busy = [now[f"lora_jax_requests_{what}"] for what in ("running", "waiting")]
            if not any(busy):
                break
            time.sleep(0.1)
        else:
            self._break(f"{busy[0]:.0f} rows run and {busy[1]:.0f} requests wait at the end")
        self._end = now["process_resident_memory_bytes"]
        if self._third and self._end > (1 + self._options.growth) * self._third:
            self._break(
                f"memory grew from {self._third / 2**20:.0f} to {self._end / 2**20:.0f} MiB"
            )

    def _found(self, seconds: float, visits: int) -> dict[str, Any]:
        heard = self._heard
        gaps = [1e3 * gap for one in heard for gap in one.gaps]
        return {
            "requests": self._options.requests,
            "at_once": self._options.at_once,
            "models": len(self._parents),
            "visits": visits,
            "seconds": round(seconds, 2),
            "right_answers": len(heard),
            "tokens_per_second": round(sum(one.tokens for one in heard) / seconds, 1),
            "first_token_ms": percentiles([1e3 * one.first for one in heard]),
            "between_pieces_ms": percentiles(gaps),
            "per_token_ms": percentiles([1e3 * x for one in heard if (x := one.per_token)]),
            "memory_mib": [round((x or 0) / 2**20) for x in (self._third, self._end)],
            "statuses": dict(sorted(self._statuses.items())),
        }

    def _note(self, kind: str, status: int | None) -> None:
        with self._lock:
            self._statuses[f"{kind} {status}"] += 1
        if status and status >= 500 and status != 503:
            self._break(f"{kind}: status {status}")

    def _break(self, line: str) -> None:
        with self._lock:
            self._broken.append(line)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the value that one in a hundred is above."""
    if len(values) < 2:
        return {}
    parts = statistics.quantiles(values, n=100, method="inclusive")
    return {"median": round(parts[49], 2), "p99": round(parts[98], 2), "n": len(values)}


if __name__ == "__main__":
    main()
