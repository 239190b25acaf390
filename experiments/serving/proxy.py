"""Two servers behind nginx, for real: what `nginx.conf` promises is looked at.

    PYTHONPATH=. python experiments/serving/proxy.py        # needs nginx, and ports 8000 to 8002

Each line says what held; what does not ends the script with exit code 1.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.serving.server import Client, Heard, Server  # noqa: E402

CONFIG = ROOT / "experiments" / "serving" / "nginx.conf"
BODY = {"prompt": "def names(self):", "temperature": 0, "max_tokens": 48, "ignore_eos": True}
PORTS = (8001, 8002)


def main() -> None:
    model = str(ROOT / "lora_jax" / "models" / "bundled")
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:  # both compile at one time
            servers = [Server([model, "--max-length", "256"], port) for port in PORTS]
            list(pool.map(stack.enter_context, servers))
        stack.enter_context(nginx())
        direct = [Client(server.url) for server in servers]
        expected = direct[0].stream(BODY)
        say("streamed", streamed_alike(expected))
        say("one session, one process", one_session(direct))
        say("64 requests at 16 a time", spread_out(direct, expected.text))
        say("a client that hangs up frees its row", hangs_up(direct))
        say("a body of 2 MiB is refused", too_long())
        servers[0].__exit__()
        say("a process that is gone is passed over", passed_over(expected.text))


@contextlib.contextmanager
def nginx() -> Iterator[None]:
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with tempfile.TemporaryDirectory() as folder:
        words = [program, "-p", folder, "-c", str(CONFIG), "-g", "daemon off;"]
        running = subprocess.Popen(words)
        try:
            time.sleep(1)
            yield
        finally:
            running.send_signal(signal.SIGQUIT)
            running.wait(30)


def through(session: str | None = None) -> Client:
    return Client("http://127.0.0.1:8000", **({"X-Session": session} if session else {}))


def streamed_alike(direct: Heard) -> str:
    """The same text, in pieces that come one after another as they do without nginx."""
    heard = through().stream(BODY)
    assert heard.status == 200 and heard.text == direct.text
    spans = [one.times[-1] - one.first for one in (heard, direct)]
    assert len(heard.times) > 8 and spans[0] > spans[1] / 4, spans
    return f"{len(heard.times)} pieces over {spans[0]:.3f} s, {spans[1]:.3f} without nginx"


def tokens(direct: list[Client]) -> list[float]:
    return [one.metrics()["lora_jax_engine_generation_tokens_total"] for one in direct]


def one_session(direct: list[Client]) -> str:
    """All of a session's requests go where the first one went."""
    before = tokens(direct)
    for _ in range(8):
        assert through("somebody").stream(BODY).status == 200
    given = [b - a for a, b in zip(before, tokens(direct), strict=True)]
    assert sorted(given) == [0, 8 * BODY["max_tokens"]], given
    return f"tokens by process {given}"


def spread_out(direct: list[Client], expected: str) -> str:
    before = tokens(direct)
    with ThreadPoolExecutor(16) as pool:
        heard = list(pool.map(lambda i: through(f"session {i}").stream(BODY), range(64)))
    assert all(one.text == expected for one in heard)
    given = [b - a for a, b in zip(before, tokens(direct), strict=True)]
    assert min(given) > 0
    return f"tokens by process {given}"


def hangs_up(direct: list[Client]) -> str:
    through().stream(BODY | {"max_tokens": 200}, leave_after=1)
    start = time.perf_counter()
    while any(one.metrics()["lora_jax_requests_running"] for one in direct):
        assert time.perf_counter() - start < 5
    return f"within {time.perf_counter() - start:.3f} s"


def too_long() -> str:
    status, _ = through().post("/v1/completions", BODY | {"prompt": "x" * (2 << 20)})
    assert status == 413, status
    return f"with {status}"


def passed_over(expected: str) -> str:
    heard = [through(f"session {i}").stream(BODY) for i in range(16)]
    assert all(one.text == expected for one in heard), [one.status for one in heard]
    return f"{len(heard)} of {len(heard)} answers"


def say(what: str, found: str) -> None:
    print(f"{what}: {found}", flush=True)


if __name__ == "__main__":
    main()
