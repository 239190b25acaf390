"""The description of the interface, in OpenAPI 3.1."""

from typing import Any

from ._schema import CHAT, COMPLETION, LOAD, UNLOAD, Schema

_ANSWERS = {
    400: "a body that the description does not allow, or a prompt that is too long",
    401: "no valid key",
    403: "a call from another site's page",
    404: "no such model or route",
    408: "a body that took too long",
    413: "a body with too many bytes",
    415: "a body that is not JSON by its type",
    422: "what is described but cannot be done, such as a conversation that the template refuses",
    429: "too many calls are in flight",
    503: "the server stops, failed, or took too long",
}
_ERROR: Schema = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_CARD: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "root", "parent", "max_model_len"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {"type": "string"},
        "parent": {"type": ["string", "null"], "description": "the base of an adapter"},
        "max_model_len": {"type": "integer"},
    },
}
_CARDS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _CARD}},
}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        name: {"type": "integer", "minimum": 0}
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
}
_EVENT: Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}},
}


def described(adapters: bool) -> dict[str, Any]:
    """The document; `adapters` tells whether clients may load and unload some."""
    paths = {
        "/health": {"get": _operation("Whether the server is up.", {}, errors=(503,), open=True)},
        "/metrics": {"get": _operation("Counts for Prometheus.", "text/plain")},
        "/openapi.json": {"get": _operation("This description.", {})},
        "/v1/models": {"get": _operation("The base and its adapters.", _CARDS)},
        "/v1/models/{model}": {
            "get": _operation("One of them.", _CARD, errors=(404,))
            | {"parameters": [_parameter("model")]}
        },
        "/v1/completions": {
            "post": _answer("Continue texts.", COMPLETION, _whole("text_completion"))
        },
        "/v1/chat/completions": {
            "post": _answer("Answer a conversation.", CHAT, _whole("chat.completion"))
        },
    }
    if adapters:
        changed = (400, 404, 408, 413, 415, 422)
        for action, schema in (("load", LOAD), ("unload", UNLOAD)):
            text = f"{action.capitalize()} an adapter."
            paths[f"/v1/{action}_lora_adapter"] = {
                "post": _operation(text, "text/plain", errors=changed) | _body(schema)
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "lora_jax", "version": "1", "description": "OpenAI's routes."},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _answer(text: str, body: Schema, whole: Schema) -> dict[str, Any]:
    made = _operation(text, whole, errors=(400, 404, 408, 413, 415, 422))
    made["responses"]["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    return made | _body(body)


def _operation(
    text: str,
    content: Schema | str,
    *,
    errors: tuple[int, ...] = (),
    open: bool = False,
) -> dict[str, Any]:
    """A route: what it answers, and how it refuses; all but an open one want a key."""
    kind, schema = (content, {"type": "string"}) if isinstance(content, str) else (_JSON, content)
    codes = errors if open else sorted({401, 403, 429, 503, *errors})
    responses: dict[str, Any] = {
        "200": {"description": "done", "content": {kind: {"schema": schema}}}
    }
    for code in codes:
        error = {"$ref": "#/components/schemas/Error"} if not open else {}
        responses[str(code)] = {
            "description": _ANSWERS[code], "content": {_JSON: {"schema": error}},
        }  # fmt: skip
    return {"summary": text, "responses": responses, **({"security": []} if open else {})}


_JSON = "application/json"


def _body(schema: Schema) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}


def _parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _whole(kind: str) -> Schema:
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["index", "finish_reason", "logprobs"],
                    "properties": {
                        "index": {"type": "integer"},
                        "finish_reason": {"enum": ["stop", "length"]},
                    },
                },
            },
            "usage": _USAGE,
        },
    }
