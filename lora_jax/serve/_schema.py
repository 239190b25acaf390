"""What a call may hold, as JSON Schemas: what is checked is what the description says."""

import itertools
import json
from typing import Any

import jsonschema_rs

from .._errors import nearest
from ..models import MOST_LOGPROBS
from ._api_error import ApiError

Schema = dict[str, Any]
_SHOWN, _MOST_SHOWN = 8, 100
"""Elements of lists and characters of texts that an error is looked for in, and told of."""


def _maybe(kind: str, **rules: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **rules}


def _count(least: int, most: int = 2**31 - 1) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _real(least: float, most: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _only(*values: Any) -> dict[str, Any]:
    """A field that other servers know and this one has in its neutral value alone."""
    return {"enum": [None, *values]}


def _list(items: Schema, most: int, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_TEXT = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": 256}
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
    "repetition_penalty": _real(0.01, 100),
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
    "min_tokens": _only(0),
    "use_beam_search": _only(False),
    "skip_special_tokens": _only(True),
    "spaces_between_special_tokens": _only(True),
    "include_stop_str_in_output": _only(False),
    "prompt_logprobs": _only(),
    # What tells the server nothing that it would do otherwise.
    "user": _maybe("string"),
    "metadata": _maybe("object"),
    "store": _maybe("boolean"),
    "service_tier": _maybe("string"),
    "safety_identifier": _maybe("string"),
    "prompt_cache_key": _maybe("string"),
}  # fmt: skip
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_CONTENT = [_TEXT, _list(_PART, 1000, least=0)]
_ASKED = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "tool", "function"]},
        "content": {"anyOf": _CONTENT},
    },
}
_TOOL_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": {"type": "string", "minLength": 1}, "arguments": _TEXT},
        }
    },
}
_ANSWERED = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"const": "assistant"},
        "content": {"anyOf": [*_CONTENT, {"type": "null"}]},
        "tool_calls": _maybe("array", items=_TOOL_CALL, maxItems=128),
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
        "best_of": _only(1),
        "suffix": _only(""),
        "add_special_tokens": _only(True),
    },
}
CHAT: Schema = {
    "title": "ChatCompletionRequest",
    "type": "object",
    "required": ["messages"],
    "additionalProperties": False,
    "properties": {
        "messages": _list({"anyOf": [_ASKED, _ANSWERED]}, 1024)
        | {"description": "turns {role, content}, the content a text or parts {type: text, text}"},
        **_SAMPLING,
        "max_completion_tokens": _count(1),
        "logprobs": _maybe("boolean"),
        "top_logprobs": _count(0, MOST_LOGPROBS),
        "response_format": _maybe(
            "object", required=["type"], properties={"type": {"const": "text"}}
        ),
        "tools": _maybe("array", maxItems=0),
        "functions": _maybe("array", maxItems=0),
        "tool_choice": _only("none", "auto"),
        "function_call": _only("none", "auto"),
        "parallel_tool_calls": _maybe("boolean"),
        "modalities": _only(["text"]),
        "add_generation_prompt": _only(True),
        "continue_final_message": _only(False),
        "chat_template_kwargs": _maybe("object", maxProperties=0),
        "reasoning_effort": _only("none"),
        "verbosity": _only(),
        "prediction": _only(),
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
        "lora_path": _NAME | {"maxLength": 4096},
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


_VALIDATORS = {
    schema["title"]: jsonschema_rs.Draft202012Validator(schema)
    for schema in (COMPLETION, CHAT, LOAD, UNLOAD)
}


def parsed(raw: bytes, schema: Schema) -> dict[str, Any]:
    """The body of a call.

    Raises:
        ApiError: 400, naming the field, if it is not JSON or not what the schema describes.
    """
    try:
        text = raw.decode("utf-8-sig")
        body = json.loads(text, parse_float=_number, parse_constant=_no_constant)
        if "\\ud" in text.lower():  # half a character can be written so
            json.dumps(body, ensure_ascii=False).encode()
        valid = _VALIDATORS[schema["title"]].is_valid(body)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:_MOST_SHOWN]
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not valid:
        raise _told(body, schema)
    return {name: value for name, value in body.items() if value is not None}


def _told(body: Any, schema: Schema) -> ApiError:
    """What is wrong with a body, with the name of the field.

    It is looked for in the beginning of each list and text: in all of a large body that takes long.
    """
    fields = schema["properties"]
    unknown = [name for name in body if name not in fields] if isinstance(body, dict) else []
    if unknown:
        name = unknown[0][:_MOST_SHOWN]
        return ApiError(400, f"{name!r}: unknown field{nearest(name, fields)}", name)
    for error in _VALIDATORS[schema["title"]].iter_errors(_beginning(body)):
        path = ".".join(map(str, error.instance_path))
        field = path.partition(".")[0]
        meant = fields.get(field, {}).get("description")
        rule = error.schema_path[-1]
        message = f"must be {meant}" if rule == "anyOf" and meant else error.message
        message = message[: 3 * _MOST_SHOWN]
        return ApiError(400, f"{path}: {message}" if path else message, field or None)
    return ApiError(400, "a list or a text of the body is too long, or holds what it may not")


def _beginning(value: Any, depth: int = 8) -> Any:
    """As much of a value as an error is looked for in; nothing that is described is as deep."""
    if isinstance(value, str):
        return value[:_MOST_SHOWN]
    if depth and isinstance(value, list):
        return [_beginning(element, depth - 1) for element in value[:_SHOWN]]
    if depth and isinstance(value, dict):
        some = itertools.islice(value.items(), _MOST_SHOWN)
        return {name: _beginning(own, depth - 1) for name, own in some}
    return None if isinstance(value, list | dict) else value


def _number(text: str) -> int | float:
    """JSON Schema takes 1.0 for the whole number that it is; so does whoever reads the body."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
