"""One call from its requests to the last byte of its answer."""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .._errors import InputError
from ._answers import ResponseWriter
from ._api_error import ApiError
from ._catalog import Catalog
from ._guard import busy
from ._inbox import Inbox
from ._metrics import Metrics
from ._request import Event
from ._scheduler import QueueFullError

log = logging.getLogger("uvicorn.error")
_READING = 5.0
"""Seconds that a client has to read the end of its answer, beside the time for making it."""
_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would keep pieces back
}


class Call:
    """An answer that is being written: whole, or piece by piece as it comes.

    A client that hangs up lets its rows go at once, whether it waits or reads.

    Args:
        catalog: Whose engine answers.
        metrics: What is told of it.
        writer: The call, and the shape of its answer.
        begun: When it arrived, by `time.perf_counter`.
    """

    def __init__(
        self, catalog: Catalog, metrics: Metrics, writer: ResponseWriter, begun: float
    ) -> None:
        self._catalog, self._metrics, self._writer = catalog, metrics, writer
        self._request, self._begun = writer.request, begun
        self._first = [0.0] * len(self._request.requests)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI app does."""
        inbox = Inbox()
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: inbox.cancel())
        try:
            # Somebody who does not read keeps nothing either.
            async with asyncio.timeout(self._catalog.settings.timeout + _READING):
                await self._answer(inbox, scope, receive, send)
        except TimeoutError:
            log.warning("an answer was not read in time, and is given up")
        except ApiError:
            if not gone.done():
                raise
        finally:
            inbox.cancel()
            gone.cancel()

    async def _answer(self, inbox: Inbox, scope: Scope, receive: Receive, send: Send) -> None:
        self._submit(inbox)
        if self._request.stream:
            await self._stream(inbox, send)
            return
        async for _ in self._watched(inbox):
            pass
        await JSONResponse(self._writer.whole(inbox.tickets))(scope, receive, send)

    def _submit(self, inbox: Inbox) -> None:
        engine, requests = self._catalog.engine, self._request.requests
        listeners = [inbox.listener(index) for index in range(len(requests))]
        try:
            inbox.tickets.extend(engine.submit_all(requests, listeners))
        except QueueFullError as error:
            raise busy(str(error)) from None
        except InputError as error:
            if engine.closed:
                raise _stopping() from None
            self._catalog.model(self._request.model)  # which may be gone meanwhile
            field = str(error).partition(":")[0]
            where = field if field.isidentifier() else None
            raise ApiError(400, self._catalog.hidden(error), where) from None

    async def _watched(self, inbox: Inbox) -> AsyncIterator[dict[int, list[Event]]]:
        """Events, of which the metrics are told.

        Raises:
            ApiError: if a request ended without its answer, once all have ended.
        """
        failure: ApiError | None = None
        async for come in inbox.events():
            now = time.perf_counter()
            for index, events in come.items():
                self._first[index] = self._first[index] or now
                if events[-1].ending is not None:
                    self._note(inbox, index, str(events[-1].ending), now)
                    failure = failure or self._failure(events[-1])
            if failure is None:
                yield come
            else:
                inbox.cancel()
        if failure is not None:
            raise failure

    def _note(self, inbox: Inbox, index: int, ending: str, now: float) -> None:
        name, metrics, ticket = self._request.model, self._metrics, inbox.tickets[index]
        count, first = len(ticket.completion.tokens), self._first[index]
        metrics.requests.labels(name, ending).inc()
        if index % self._request.choices == 0:
            metrics.prompt_tokens.labels(name).inc(ticket.prompt_tokens)
        metrics.new_tokens.labels(name).inc(count)
        metrics.latency.labels(name).observe(now - self._begun)
        if count:
            metrics.first_token.labels(name).observe(first - self._begun)
        if count > 1:
            metrics.per_token.labels(name).observe((now - first) / (count - 1))

    def _failure(self, last: Event) -> ApiError | None:
        """Why there is no answer, if there is none."""
        if last.ending in ("stop", "length"):
            return None
        if last.ending == "cancelled":
            return _stopping()
        if last.ending == "deadline":
            seconds = self._catalog.settings.timeout
            once = {"x-should-retry": "false"}  # a client would wait as long again
            return ApiError(503, f"no whole answer in {seconds:g} s", code="timeout", headers=once)
        message = self._catalog.hidden(last.error or "failed")
        if last.ending == "refused":
            return ApiError(422, message, "model", "adapter_refused")
        return ApiError(503, message, code="failed")

    async def _stream(self, inbox: Inbox, send: Send) -> None:
        told = [Told() for _ in inbox.tickets]
        begun = False
        try:
            async for come in self._watched(inbox):
                pieces = [self._piece(i, events, told[i]) for i, events in come.items()]
                if not begun:
                    begun = True
                    headers = [(k.encode(), v.encode()) for k, v in _STREAM.items()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if body := b"".join(pieces):
                    await _send(send, body)
            if self._request.usage:
                await _send(send, _line(self._writer.last(inbox.tickets)))
        except ApiError as error:
            if not begun:
                raise
            await _send(send, _line(error.body()))
        await _send(send, b"data: [DONE]\n\n", more=False)

    def _piece(self, index: int, events: list[Event], told: "Told") -> bytes:
        """What is new of one choice as a line of the stream; nothing where nothing is."""
        new = any(e.text or e.logprobs is not None or e.ending is not None for e in events)
        if not (new or told.first):
            return b""
        piece = self._writer.piece(index, events, first=told.first, offset=told.offset)
        told.first, told.offset = False, told.offset + self._writer.length(events)
        return _line(piece)


@dataclasses.dataclass
class Told:
    """How much of a choice its client knows: nothing yet, or tokens of so many characters."""

    first: bool = True
    offset: int = 0


async def received(request: HttpRequest, most: int) -> bytes:
    """The body of a call.

    Raises:
        ApiError: 413, if it has more bytes than allowed.
    """
    too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    return bytes(body)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"retry-after": "5"})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode()
