"""Who may call, how much at one time, and what an answer says when something fails."""

import base64
import binascii
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._api_error import ApiError
from ._metrics import Metrics

OPEN = "/health"
"""The one route that needs no key, and answers however busy the server is."""


class Guard:
    """Stands before an app.

    Args:
        app: What answers those who may call.
        api_keys: Any of them opens; empty: no key is needed.
        most: Calls that may be in flight at one time.
        metrics: Where answers are counted.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], most: int, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in api_keys]
        self._most, self._inside = most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        self._inside += 1
        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except ApiError as error:
            await refusal(error)(scope, receive, counted)
        finally:
            self._inside -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] == OPEN:
            return
        if self._keys and not self._opens(headers.get("authorization", "")):
            page = "text/html" in headers.get("accept", "")
            raise ApiError(
                401,
                "no valid API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": f'{"Basic" if page else "Bearer"} realm="lora_jax"'},
            )
        if _elsewhere(headers):
            raise ApiError(403, "calls from pages of another origin are not answered")
        if self._inside > self._most:
            raise busy(f"{self._most} calls are in flight, and no more may")

    def _opens(self, given: str) -> bool:
        """Compared with every key, in a time that tells nothing of them."""
        kind, _, text = given.partition(" ")
        key = text.strip()
        if kind.lower() == "basic":  # what a browser's own dialog sends
            key = _password(key)
        found = [hmac.compare_digest(key.encode(), own) for own in self._keys]
        return kind.lower() in ("bearer", "basic") and any(found)


def _elsewhere(headers: Headers) -> bool:
    """Whether a browser sends what another site's page asks of a server that it can reach.

    Browsers say so themselves, but for plain http to other machines: there the names are compared.
    A link that leads here is followed.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if headers.get("sec-fetch-mode") == "navigate" and origin is None:
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _password(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def busy(message: str) -> ApiError:
    """Too many calls: the client is to try again."""
    return ApiError(429, message, code="too_many_requests", headers={"retry-after": "1"})


def refusal(error: ApiError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error.body(), error.status, error.headers)


async def _refused(request: Request, error: Any) -> JSONResponse:
    return refusal(error)


async def _no_route(request: Request, error: Any) -> JSONResponse:
    what = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return refusal(ApiError(error.status_code, what, headers=error.headers))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return refusal(ApiError(500, "the server failed; its log tells more"))


HANDLERS: Mapping[Any, Any] = {ApiError: _refused, HTTPException: _no_route, Exception: _failed}
"""Each error as an answer in one shape."""
