"""The turns of a conversation, in the ways in which files spell them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import nearest

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = {"role", "from", "content", "value", "weight", "train", "tool_calls", "function_call"}
"""What a turn is read from; the tokenizer's template gets the rest as it is."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn: who speaks, what, and for an instruction the input it works on.

    `trained` is False where the file gives an answer the weight 0.  `more` is what only the
    tokenizer's own template can show: `tool_calls` (arguments as objects), `reasoning_content`, …
    """

    role: str
    content: str
    input: str = ""
    trained: bool = True
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content and input as one text, for templates that know no input."""
        return f"{self.content}\n{self.input}" if self.input else self.content

    @property
    def written(self) -> str:
        """The text with its tool calls as lines of JSON, for templates that know no tools."""
        calls = [
            json.dumps(call.get("function", call), ensure_ascii=False)
            for call in self.more.get("tool_calls") or []
        ]
        return "\n".join([self.text, *calls] if self.text else calls)


class BadRow(Exception):
    """What is wrong with one row, and what to try."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason


def read_turns(turns: Any) -> tuple[Message, ...]:
    """A list of `{role, content}` or `{from, value}`, to learn answers from.

    Raises:
        BadRow: naming the turn, if it is anything else, or an empty answer.
    """
    messages = spoken_turns(turns)
    for number, message in enumerate(messages, 1):
        empty = not message.content.strip() and not message.more.get("tool_calls")
        if message.role == "assistant" and empty:
            raise BadRow(f"turn {number} is an empty answer", "give the answer, or remove the row")
    return messages


def spoken_turns(turns: Any) -> tuple[Message, ...]:
    """The same, to be answered: an empty answer is one too.

    Raises:
        BadRow: naming the turn, if it is anything else.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRow("the conversation is not a list of turns", "write [{role, content}, …]")
    return tuple(_turn(turn, number) for number, turn in enumerate(turns, 1))


def read_tools(tools: Any, *, bare: bool) -> tuple[Mapping[str, Any], ...]:
    """The tools a conversation may call: a list of JSON schemas, or its text.

    Args:
        tools: A cell of the column `tools`.
        bare: Whether the file's format has functions where templates expect
            `{type: function, function: …}`.

    Raises:
        BadRow: if it is anything else.
    """
    if tools is None or tools == "" or tools != tools:  # NaN, which tables hold where nothing is
        return ()
    given = _parsed(tools)
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRow("tools is not a list of objects", "write [{type: function, function: …}, …]")
    wrap = [bare and "function" not in tool for tool in given]
    return tuple(
        {"type": "function", "function": tool} if wrapped else tool
        for tool, wrapped in zip(given, wrap, strict=True)
    )


def cell_text(value: Any, column: str) -> str:
    """A cell as text: nothing is "", a number is written out.

    Raises:
        BadRow: for anything else.
    """
    if value is None or value != value:  # NaN, which tables hold where nothing is
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{column} is a {type(value).__name__}", "it must be a string")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column} holds half a character", "write it as valid UTF-8") from None
    return text


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is not an object", "write {role, content}")
    said = str(turn.get("role", turn.get("from", "")))
    role = _ROLES.get(said.lower(), said.lower())
    if role not in _KNOWN_ROLES:
        raise BadRow(
            f"turn {number} has the role {said!r}{nearest(said, [*_KNOWN_ROLES, *_ROLES])}",
            f"use {', '.join(_KNOWN_ROLES)}",
        )
    content = turn.get("content", turn.get("value"))
    calls = _calls(turn, number)
    if said.lower() in ("function_call", "tool_call") and (spoken := _spoken_calls(content)):
        calls, content = spoken, ""
    more = {key: value for key, value in turn.items() if key not in TURN_KEYS and value is not None}
    if calls:
        # A template may ask whether there is a content.
        more |= {"tool_calls": calls, **({"content": None} if content is None else {})}
        content = "" if content is None else content
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise BadRow(f"turn {number} has no text", "give its content as a string")
    weight = turn.get("weight", turn.get("train"))
    trained = weight is None or bool(weight)
    return Message(role, cell_text(content, f"turn {number}"), trained=trained, more=more)


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"turn {number} holds something other than text", "keep only its text parts")


def _calls(turn: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """`tool_calls`, or the older `function_call`; arguments that are JSON texts become objects."""
    given = turn.get("tool_calls")
    if not given and turn.get("function_call"):
        given = [{"type": "function", "function": turn["function_call"]}]
    if not given:
        return []
    given = _parsed(given)
    if not isinstance(given, list):
        raise BadRow(f"turn {number} has tool_calls that are no list", "write [{function: …}, …]")
    return [_call(call, number) for call in given]


def _call(call: Any, number: int) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRow(f"turn {number} calls no function by its name", "write {name, arguments}")
    arguments = _parsed(inner.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise BadRow(
            f"turn {number} calls {inner['name']} with arguments that are no object",
            "write them as JSON: {name: value, …}",
        )
    call = {key: value for key, value in call.items() if value is not None}
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else {**call, **inner}


def _spoken_calls(text: Any) -> list[dict[str, Any]]:
    """Calls that a turn of their own speaks as JSON; none where it is something else."""
    spoken = _parsed(text)
    calls: Sequence[Any] = spoken if isinstance(spoken, list) else [spoken]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    return [_call({"type": "function", "function": call}, 0) for call in calls]


def _parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
