"""The routes, as OpenAI and vLLM have them."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from . import _api_request, _schema
from ._answers import ChatFormat, CompletionFormat, Format, ResponseWriter
from ._api_error import ApiError
from ._api_request import ApiRequest
from ._call import Call, received
from ._catalog import Catalog, ServedModel
from ._guard import HANDLERS, Guard
from ._metrics import Metrics
from ._openapi import described
from ._page import page_routes

_BODY_SECONDS = 15.0
"""How long the body of a call may take to arrive."""
_SPARE = 64
"""Calls in flight beside those that have a row or wait for one: those that ask for models, say."""
Reading = Callable[[dict[str, Any], Catalog], ApiRequest]


def make_app(catalog: Catalog) -> ASGIApp:
    """An ASGI app that answers for a catalog's engine."""
    service = Service(catalog)
    routes = [
        Route("/health", service.health),
        Route("/metrics", service.measured),
        Route("/openapi.json", service.description),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/load_lora_adapter", service.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", service.unload, methods=["POST"]),
        *page_routes(),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    engine, settings = catalog.engine, catalog.settings
    most = engine.max_rows + engine.max_waiting + _SPARE
    return Guard(app, settings.api_keys, settings.hosts, most, service.metrics)


class Service:
    """What the routes do."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._engine = catalog, catalog.engine
        self.metrics = Metrics(catalog.engine)
        self._loading = asyncio.Lock()

    async def health(self, request: HttpRequest) -> Response:
        alive = not self._engine.closed
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def measured(self, request: HttpRequest) -> Response:
        return Response(
            generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def description(self, request: HttpRequest) -> Response:
        return JSONResponse(described(self._catalog.settings.adapter_root is not None))

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._card(model) for model in self._catalog.models]}
        )

    async def model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._card(self._catalog.model(request.path_params["model"])))

    def _card(self, model: ServedModel) -> dict[str, Any]:
        base = self._catalog.settings.base_name
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "lora_jax",
            "root": base,
            "parent": None if model.adapter is None else base,
            "max_model_len": self._engine.max_length,
        }

    async def completions(self, request: HttpRequest) -> ASGIApp:
        return await self._answer(
            request, _schema.COMPLETION, _api_request.completion, CompletionFormat()
        )

    async def chat(self, request: HttpRequest) -> ASGIApp:
        return await self._answer(request, _schema.CHAT, _api_request.chat, ChatFormat())

    async def load(self, request: HttpRequest) -> Response:
        body = await self._change(request, _schema.LOAD)
        name, path = body["lora_name"], body["lora_path"]
        replace = body.get("load_inplace", False)
        async with self._loading:
            await run_sync(lambda: self._catalog.load(name, path, replace=replace))
        return PlainTextResponse(f"Success: LoRA adapter {name!r} is loaded.")

    async def unload(self, request: HttpRequest) -> Response:
        body = await self._change(request, _schema.UNLOAD)
        async with self._loading:
            self._catalog.unload(body["lora_name"])
            self.metrics.forget(body["lora_name"])
        return PlainTextResponse(f"Success: LoRA adapter {body['lora_name']!r} is unloaded.")

    async def _change(self, request: HttpRequest, schema: _schema.Schema) -> dict[str, Any]:
        if self._catalog.settings.adapter_root is None:
            raise ApiError(
                404, "adapters are not loaded or unloaded here; --adapter-root DIR allows it"
            )
        return await self._body(request, schema)

    async def _answer(
        self, request: HttpRequest, schema: _schema.Schema, read: Reading, format: Format
    ) -> ASGIApp:
        begun = time.perf_counter()
        body = await self._body(request, schema)
        asked = await run_sync(read, body, self._catalog)
        writer = ResponseWriter(asked, format, self._catalog.tokenizer)
        return Call(self._catalog, self.metrics, writer, begun).respond

    async def _body(self, request: HttpRequest, schema: _schema.Schema) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body must be application/json, got {kind[:80] or 'nothing'}")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                raw = await received(request, self._catalog.settings.max_body)
        except TimeoutError:
            raise ApiError(408, f"the body took more than {_BODY_SECONDS:.0f} s") from None
        return _schema.parsed(raw, schema)
