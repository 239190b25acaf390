"""A server on a port of its own, in a thread."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from lora_jax.models import Pretrained
from lora_jax.serve import Engine, ServerSettings, asgi_app

KEY = "a-key-of-the-tests"


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """An app behind uvicorn; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def client_of(
    engine: Engine, base: Pretrained, adapters: dict[str, Path], **settings: Any
) -> Iterator[httpx2.Client]:
    """A client of a server of its own over an engine."""
    app = asgi_app(engine, base, adapters, ServerSettings(**settings))
    with running(app) as address, httpx2.Client(base_url=address, timeout=60) as client:
        yield client


def completion(client: httpx2.Client, prompt: Any, **fields: Any) -> httpx2.Response:
    fields = {"temperature": 0, "max_tokens": 8, **fields}
    return client.post("/v1/completions", json={"prompt": prompt, **fields})


def chat(client: httpx2.Client, text: str, **fields: Any) -> httpx2.Response:
    fields = {"temperature": 0, "max_tokens": 8, **fields}
    messages = [{"role": "user", "content": text}]
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def pieces(response: httpx2.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which ends as OpenAI's does."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


def until(holds: Any) -> None:
    """Wait for what comes soon; the test fails where it does not come at all."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")
