"""A tokenizer's own chat template, run in a sandbox."""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import InputError
from .._tokenizer import Tokenizer
from ._turns import Message

# A moving date would make yesterday's run impossible to resume; this one is Llama's own default.
_TODAY = datetime.datetime(2024, 7, 26)
_START, _END = "\ue0f0", "\ue0f1"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of what a conversation may call."""


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = (), *, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation with the tokenizer's chat template.

    Args:
        messages: The turns.
        tokenizer: Gives the template and the texts of its special tokens.
        tools: What the conversation may call.
        prompt: Whether to end where the assistant's answer begins.

    Returns:
        The text, and the spans (start, end) that `{% generation %}` marks in it.

    Raises:
        InputError: if the template is broken, refuses the conversation, or does anything that
            the sandbox forbids, or far more than a conversation needs.
    """
    for message in messages:
        if _START in message.written or _END in message.written:
            raise InputError("a message holds U+E0F0 or U+E0F1, which mark spans here; remove it")
    from ._bounded import bounded

    try:
        turns = [_as_transformers_has_it(message) for message in messages]
        with bounded((turns, tools)):
            template = _compiled(template_source(tokenizer, tools))
            marked = template.render(
                messages=turns,
                add_generation_prompt=prompt,
                tools=list(tools) or None,
                documents=None,
                **tokenizer.special_tokens,
            )
    except Exception as error:  # It is foreign code: it may fail in any way.
        raise InputError(f"chat template: {_one_line(error)}; give template: chatml") from None
    return _spans(marked)


def template_source(tokenizer: Tokenizer, tools: Tools = ()) -> str:
    """The template that the tokenizer has for conversations with or without tools."""
    own = tokenizer.tool_template if tools else None
    return own or tokenizer.chat_template or ""


def marks_generation(tokenizer: Tokenizer, tools: Tools = ()) -> bool:
    """Whether the template says itself what the assistant generates."""
    return _GENERATION_TAG.search(template_source(tokenizer, tools)) is not None


def _as_transformers_has_it(message: Message) -> dict[str, Any]:
    """A turn as templates know it: no nulls, and reasoning under the name they read."""
    turn = {"role": message.role, "content": message.text, **message.more}
    turn = {key: value for key, value in turn.items() if value is not None}
    reasoning = [turn[name] for name in _REASONING if name in turn]
    if reasoning:
        turn = {"thinking": reasoning[0], **turn, "reasoning_content": reasoning[0]}
    return turn


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    from ._bounded import BoundedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}`: its output is put between two marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start = nodes.Output([nodes.TemplateData(_START)], lineno=line)
            end = nodes.Output([nodes.TemplateData(_END)], lineno=line)
            return [start, *body, end]

    environment = BoundedEnvironment(
        {"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which no model has been trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out of a text and say where they stood."""
    text, spans, start = "", [], 0
    for piece in re.split(f"([{_START}{_END}])", marked):
        if piece == _START:
            start = len(text)
        elif piece == _END:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, [span for span in spans if span[0] < span[1]]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
