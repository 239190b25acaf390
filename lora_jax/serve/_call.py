"""One call from its requests to the last byte of its answer."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .._errors import InputError
from ._answers import Teller
from ._api_error import ApiError
from ._catalog import Catalog
from ._guard import busy
from ._inbox import Inbox
from ._metrics import Metrics
from ._request import Event
from ._scheduler import QueueFullError

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
        teller: The call, and the shape of its answer.
        begun: When it arrived, by `time.perf_counter`.
    """

    def __init__(self, catalog: Catalog, metrics: Metrics, teller: Teller, begun: float) -> None:
        self._catalog, self._metrics, self._teller = catalog, metrics, teller
        self._asked, self._begun = teller.asked, begun
        self._first = [0.0] * len(self._asked.requests)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI app does."""
        inbox = Inbox()
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: inbox.cancel())
        try:
            self._submit(inbox)
            if self._asked.stream:
                await self._stream(inbox, send)
            else:
                async for _ in self._watched(inbox):
                    pass
                await JSONResponse(self._teller.whole(inbox.tickets))(scope, receive, send)
        finally:
            inbox.cancel()
            gone.cancel()

    def _submit(self, inbox: Inbox) -> None:
        engine = self._catalog.engine
        for index, request in enumerate(self._asked.requests):
            try:
                inbox.tickets.append(engine.submit(request, inbox.listener(index)))
            except QueueFullError as error:
                raise busy(str(error)) from None
            except InputError as error:
                if engine.closed:
                    raise _stopping() from None
                self._catalog.voice(self._asked.model)  # which may be gone meanwhile
                field = str(error).partition(":")[0]
                raise ApiError(
                    400, self._catalog.hidden(error), field if field.isidentifier() else None
                ) from None

    async def _watched(self, inbox: Inbox) -> AsyncIterator[dict[int, list[Event]]]:
        """Events, of which the metrics are told.

        Raises:
            ApiError: 503, if a request ends without its answer.
        """
        async for come in inbox.events():
            now = time.perf_counter()
            for index, events in come.items():
                self._first[index] = self._first[index] or now
                if events[-1].ending is not None:
                    self._note(inbox, index, events[-1], now)
            yield come

    def _note(self, inbox: Inbox, index: int, last: Event, now: float) -> None:
        name, metrics, ticket = self._asked.model, self._metrics, inbox.tickets[index]
        count, first = len(ticket.completion.tokens), self._first[index]
        metrics.requests.labels(name, str(last.ending)).inc()
        metrics.prompt_tokens.labels(name).inc(ticket.prompt_tokens)
        metrics.new_tokens.labels(name).inc(count)
        metrics.latency.labels(name).observe(now - self._begun)
        if count:
            metrics.first_token.labels(name).observe(first - self._begun)
        if count > 1:
            metrics.per_token.labels(name).observe((now - first) / (count - 1))
        if last.ending == "deadline":
            seconds = self._catalog.settings.timeout
            raise ApiError(503, f"no whole answer in {seconds:g} s", code="timeout")
        if last.ending == "cancelled":
            raise _stopping()
        if last.ending == "error":
            raise ApiError(503, self._catalog.hidden(last.error or "failed"), code="failed")

    async def _stream(self, inbox: Inbox, send: Send) -> None:
        given, begun = [-1] * len(inbox.tickets), False
        try:
            async for come in self._watched(inbox):
                pieces = b"".join(
                    self._piece(index, events, given) for index, events in come.items()
                )
                if not begun:
                    begun = True
                    headers = [(k.encode(), v.encode()) for k, v in _STREAM.items()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if pieces:
                    await _send(send, pieces)
            if self._asked.usage:
                await _send(send, _line(self._teller.last(inbox.tickets)))
        except ApiError as error:
            if not begun:
                raise
            await _send(send, _line(error.body()))
        await _send(send, b"data: [DONE]\n\n", more=False)

    def _piece(self, index: int, events: list[Event], given: list[int]) -> bytes:
        """What is new of one choice as a line of the stream; nothing where nothing is."""
        before = given[index]
        given[index] = max(before, 0) + sum(len(event.text) for event in events)
        told = any(e.text or e.logprobs is not None or e.ending is not None for e in events)
        if before >= 0 and not told:
            return b""
        return _line(self._teller.piece(index, events, before))


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
