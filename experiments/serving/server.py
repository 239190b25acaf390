"""A server in a process of its own, and a client of it made of the standard library."""

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
"""Seconds that an answer may take, and a server until it serves."""


class Server:
    """`lora serve` with these words, from when it serves until it is left; port 0 is any.

    What it says goes to standard error.
    """

    def __init__(self, words: Sequence[str], port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lora_jax", "serve", *words, "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": _path()},
        )
        self._lines: list[str] = []
        self._serving = threading.Event()
        self.url = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Self:
        deadline = time.monotonic() + PATIENCE
        while not self._serving.wait(0.1):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit("the server did not start: " + "".join(self._lines[-5:]))
        return self

    def __exit__(self, *_: Any) -> None:
        """Ask it to end, and wait until it has."""
        self._process.terminate()
        self._process.wait(PATIENCE)

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._lines.append(line)
            print(line, end="", file=sys.stderr)
            if found := re.match(r"serving .* at (http\S+)", line):
                self.url = found[1]
                self._serving.set()


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@dataclasses.dataclass
class Heard:
    """A streamed answer: its pieces by the second they came, counted from the request."""

    status: int
    text: str = ""
    tokens: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens, of which a piece may hold several."""
        return None if self.tokens < 2 else (self.times[-1] - self.first) / (self.tokens - 1)


class Client:
    """Calls to a server, each over a connection of its own."""

    def __init__(self, url: str, key: str | None = None, **headers: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"Content-Type": "application/json", **headers}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> Any:
        return json.loads(self._answer("GET", path, None)[1])

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """The status and body; what is not bytes is sent as JSON."""
        return self._answer("POST", path, body)

    def metrics(self) -> dict[str, float]:
        """Those without labels, by name."""
        lines = self._answer("GET", "/metrics", None)[1].decode().splitlines()
        pairs = [line.split() for line in lines if line[:1] not in "#" and "{" not in line]
        return {name: float(value) for name, value in pairs}

    def stream(
        self,
        body: dict[str, Any],
        *,
        leave_after: int | None = None,
        on_first: Callable[[], None] | None = None,
    ) -> Heard:
        """A completion piece by piece.

        Args:
            body: The request.
            leave_after: Hang up after so many pieces.
            on_first: Called when the first one is there.
        """
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        connection = self._send("POST", "/v1/completions", body)
        try:
            if leave_after == 0:
                return Heard(0)
            response = connection.getresponse()
            heard = Heard(response.status)
            if response.status != 200:
                heard.error = response.read().decode(errors="replace")[:200]
                return heard
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                self._hear(heard, json.loads(line[6:]), time.perf_counter() - start)
                if len(heard.times) == 1 and on_first:
                    on_first()
                    on_first = None
                if len(heard.times) == leave_after:
                    return heard
            return heard
        finally:
            connection.close()

    def _hear(self, heard: Heard, piece: dict[str, Any], now: float) -> None:
        if "error" in piece:
            heard.error = piece["error"]["message"]
        elif piece["choices"]:
            heard.text += piece["choices"][0]["text"]
            heard.times.append(now)
        if piece.get("usage"):
            heard.tokens = piece["usage"]["completion_tokens"]

    def _answer(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        connection = self._send(method, path, body)
        try:
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _send(self, method: str, path: str, body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=PATIENCE)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        # A server that refuses a long body need not read it: its answer is there all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, raw, self._headers)
        return connection
