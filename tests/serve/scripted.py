"""The chat page with models that say what a test has them say, well or badly."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from lora_jax.serve._page import page_routes

Say = Callable[[dict[str, Any]], Iterable[bytes] | Response]
"""What a model does with a request: the pieces of a stream, or another answer."""
DONE = b"data: [DONE]\n\n"


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return _line({"choices": [choice], "usage": None})


def usage(tokens: int) -> bytes:
    return _line({"choices": [], "usage": {"completion_tokens": tokens}})


def failure(message: str) -> bytes:
    return _line({"error": {"message": message}})


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def says(text: str) -> Say:
    """A model that says one text word by word, whatever it is asked."""
    first, *others = text.split(" ")
    words = [first, *(" " + word for word in others)]
    return lambda _: [*map(chunk, words), usage(len(words)), DONE]


def refusal(status: int, message: str, **headers: str) -> Response:
    error = {"message": message, "type": "some_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


def refuses(status: int, message: str, **headers: str) -> Say:
    return lambda _: refusal(status, message, **headers)


class Script:
    """Models by name, the base first, and what was asked of them.

    Attributes:
        key: What opens; None: nothing is needed.
        writing: How many answers are being written.
    """

    def __init__(self, models: dict[str, Say], key: str | None = None) -> None:
        self.models, self.key = models, key
        self.asked: list[dict[str, Any]] = []
        self.writing = 0

    def last(self, model: str) -> list[dict[str, str]]:
        """The messages that a model was sent last."""
        return [body["messages"] for body in self.asked if body["model"] == model][-1]

    def app(self) -> ASGIApp:
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        return Starlette(routes=[Route("/v1/models", self._list), chat, *page_routes()])

    def _opens(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _list(self, request: Request) -> Response:
        if not self._opens(request):
            return refusal(401, "No such key.")
        base = next(iter(self.models))
        cards = [{"id": name, "parent": None if name == base else base} for name in self.models]
        return JSONResponse({"data": cards})

    async def _chat(self, request: Request) -> Response:
        if not self._opens(request):
            return refusal(401, "No such key.")
        self.asked.append(await request.json())
        said = self.models[self.asked[-1]["model"]](self.asked[-1])
        if isinstance(said, Response):
            return said
        return StreamingResponse(self._slowly(said), media_type="text/event-stream")

    async def _slowly(self, pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
        self.writing += 1
        try:
            for piece in pieces:
                yield piece
                await asyncio.sleep(0.002)  # So that they arrive apart.
        finally:
            self.writing -= 1
