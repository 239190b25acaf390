"""What a call may hold, as JSON Schemas: what is checked is what the description says."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema_rs

from .._errors import nearest
from ..models import MOST_LOGPROBS
from ._api_error import ApiError

Schema = dict[str, Any]
_LONGEST = 200
"""Characters of a message before what was got is cut out of it."""


def _maybe(kind: str, **rules: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **rules}


def _count(least: int, most: int = 2**31 - 1) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _real(least: float, most: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _only(*values: Any) -> dict[str, Any]:
    """A field that other servers know and this one has in its neutral value alone."""
    return {"enum": [None, *values], "description": "not supported in any other value"}


def _list(items: Schema, most: int, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_TEXT = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": 1000}
_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKENS = _list(_TOKEN, 2**20)
_SAMPLING: dict[str, Any] = {
    "model": _maybe("string", description="the base or an adapter; the base if none is named"),
    "max_tokens": _count(1),
    "temperature": _real(0, 2) | {"description": "0 is greedy; 1 if none is given"},
    "top_p": _maybe("number", exclusiveMinimum=0, maximum=1),
    "top_k": _count(-1) | {"description": "0 or -1 is all"},
    "min_p": _real(0, 1),
    "presence_penalty": _real(-2, 2),
    "frequency_penalty": _real(-2, 2),
    "repetition_penalty": _maybe("number", exclusiveMinimum=0, maximum=100),
    "seed": _count(-(2**63), 2**63 - 1),
    "n": _count(1, 128),
    "stop": {
        "anyOf": [_STOP, _list(_STOP, 16, least=0), {"type": "null"}],
        "description": "a text, or a list of up to 16, none of them empty",
    },
    "stop_token_ids": _maybe("array", items=_TOKEN, maxItems=64),
    "ignore_eos": _maybe("boolean"),
    "stream": _maybe("boolean"),
    "stream_options": _maybe("object", properties={"include_usage": _maybe("boolean")}),
    "logit_bias": _maybe("object", maxProperties=0),
    # What tells the server nothing that it would do otherwise.
    "user": _maybe("string"),
    "metadata": _maybe("object"),
    "store": _maybe("boolean"),
    "service_tier": _maybe("string"),
    "safety_identifier": _maybe("string"),
    "prompt_cache_key": _maybe("string"),
}  # fmt: skip
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {
            "anyOf": [
                _TEXT,
                _list(
                    {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                    },
                    1000,
                    least=0,
                ),
                {"type": "null"},
            ],
            "description": "a text, or a list of parts {type: text, text}",
        },
        "tool_calls": _maybe("array", items={"type": "object"}),
    },
}
COMPLETION: Schema = {
    "title": "CompletionRequest",
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {
        "prompt": {
            "anyOf": [_TEXT, _list(_TEXT, 2048), _TOKENS, _list(_TOKENS, 2048)],
            "description": "a text, token ids, or a list of either",
        },
        **_SAMPLING,
        "logprobs": _count(0, MOST_LOGPROBS),
        "echo": _maybe("boolean"),
        "best_of": _count(1, 128) | {"description": "the same as n, or nothing"},
        "suffix": _only(""),
    },
}
CHAT: Schema = {
    "title": "ChatCompletionRequest",
    "type": "object",
    "required": ["messages"],
    "additionalProperties": False,
    "properties": {
        "messages": _list(_MESSAGE, 4096),
        **_SAMPLING,
        "max_completion_tokens": _count(1),
        "logprobs": _maybe("boolean"),
        "top_logprobs": _count(0, MOST_LOGPROBS),
        "response_format": _maybe(
            "object", required=["type"], properties={"type": {"const": "text"}}
        ),
        "tools": _maybe("array", maxItems=0, description="not supported"),
        "functions": _maybe("array", maxItems=0, description="not supported"),
        "tool_choice": _only("none", "auto"),
        "function_call": _only("none", "auto"),
        "parallel_tool_calls": _maybe("boolean"),
        "modalities": {"enum": [None, ["text"]]},
    },
}
_NAME = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[^\x00-\x1f\x7f]+$"}
LOAD: Schema = {
    "title": "LoadLoraAdapterRequest",
    "type": "object",
    "required": ["lora_name", "lora_path"],
    "additionalProperties": False,
    "properties": {
        "lora_name": _NAME,
        "lora_path": {"type": "string", "minLength": 1, "maxLength": 4096},
        "load_inplace": _maybe("boolean", description="whether it may take an adapter's place"),
    },
}
UNLOAD: Schema = {
    "title": "UnloadLoraAdapterRequest",
    "type": "object",
    "required": ["lora_name"],
    "additionalProperties": False,
    "properties": {"lora_name": _NAME, "lora_int_id": _maybe("integer")},
}


def parsed(raw: bytes, schema: Schema) -> dict[str, Any]:
    """The body of a call.

    Raises:
        ApiError: 400, naming the field, if it is not JSON or not what the schema describes.
    """
    try:
        body = json.loads(raw, parse_float=_number, parse_constant=_no_constant)
        if b"\\ud" in raw.lower():  # half a character can be written so
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    _check(body, schema)
    return {name: value for name, value in body.items() if value is not None}


def _check(body: Any, schema: Schema) -> None:
    for error in _validator(schema["title"]).iter_errors(body):
        raise _told(error, body, schema["properties"])


def _told(error: Any, body: Any, fields: Schema) -> ApiError:
    """What the first error says, with the name of the field."""
    path, rule = ".".join(map(str, error.instance_path)), error.schema_path[-1]
    field = path.partition(".")[0]
    if rule == "additionalProperties" and not path:
        name = next(name for name in body if name not in fields)[:80]
        return ApiError(400, f"{name}: unknown field{nearest(name, fields)}", name)
    meant = fields.get(field, {}).get("description")
    message = f"must be {meant}" if rule == "anyOf" and meant else _cut(error.message)
    if meant and "not supported" in meant:
        message = meant
    return ApiError(400, f"{path}: {message}" if path else message, field or None)


def _number(text: str) -> int | float:
    """JSON Schema takes 1.0 for the whole number that it is; so does whoever reads the body."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _cut(message: str) -> str:
    if len(message) <= _LONGEST:
        return message
    return f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"


@functools.cache
def _validator(title: str) -> Any:
    schemas: Sequence[Schema] = (COMPLETION, CHAT, LOAD, UNLOAD)
    return jsonschema_rs.Draft202012Validator(next(s for s in schemas if s["title"] == title))
