"""The chat page's server with models that say what a test has them say, well or badly."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lora_jax.serve._page import PATHS, page_file

Say = Callable[[dict[str, Any]], Iterator[bytes] | tuple[int, dict[str, str], dict[str, Any]]]
"""What a model does with a request: the pieces of a stream, or a status, headers and a body."""
DONE = b"data: [DONE]\n\n"


def chunk(text: str, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return (
        b"data: " + json.dumps({"choices": choices, **more}, ensure_ascii=False).encode() + b"\n\n"
    )


def usage(tokens: int) -> bytes:
    counts = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def says(text: str) -> Say:
    """A model that says one text, whatever it is asked."""

    def say(_: dict[str, Any]) -> Iterator[bytes]:
        words = text.split(" ")
        for n, word in enumerate(words):
            yield chunk(word if n == 0 else " " + word)
        yield usage(len(words))
        yield DONE

    return say


def refuses(status: int, message: str, **headers: str) -> Say:
    body = {"error": {"message": message, "type": "error", "param": None, "code": status}}
    return lambda _: (status, headers, body)


class Scripted:
    """What was asked, and how many answers are being written."""

    def __init__(self, models: dict[str, Say], key: str | None = None) -> None:
        self.models, self.key = models, key
        self.asked: list[dict[str, Any]] = []
        self.writing: set[int] = set()
        self.idle = threading.Event()

    def last(self, model: str) -> dict[str, Any]:
        return [body for body in self.asked if body["model"] == model][-1]

    def listing(self) -> dict[str, Any]:
        first = next(iter(self.models))
        parents = {name: None if name == first else first for name in self.models}
        return {"data": [{"id": name, "parent": parent} for name, parent in parents.items()]}


@contextlib.contextmanager
def scripted(models: dict[str, Say], key: str | None = None) -> Iterator[tuple[str, Scripted]]:
    """Serve the page and the models; the first is the base. Gives the address and what happens."""
    script = Scripted(models, key)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def may(self) -> bool:
            if script.key is None or self.headers["Authorization"] == f"Bearer {script.key}":
                return True
            status, headers, body = refuses(401, "No such key.")({})
            self.answer(status, headers, json.dumps(body).encode())
            return False

        def do_GET(self) -> None:
            if self.path in PATHS:
                body, headers = page_file(self.path)
                self.answer(200, headers, body)
            elif self.may():
                self.answer(200, {}, json.dumps(script.listing()).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.may():
                return
            script.asked.append(asked)
            said = script.models[asked["model"]](asked)
            if isinstance(said, tuple):
                status, headers, body = said
                self.answer(status, headers, json.dumps(body).encode())
                return
            mine = threading.get_ident()
            script.writing.add(mine)
            script.idle.clear()
            try:
                self.answer(200, {"Content-Type": "text/event-stream"}, b"")
                for piece in said:
                    self.wfile.write(piece)
                    time.sleep(0.005)  # So that pieces arrive apart.
            except OSError:
                pass  # The reader hung up.
            finally:
                script.writing.discard(mine)
                if not script.writing:
                    script.idle.set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", script
        server.shutdown()
