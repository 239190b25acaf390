"""The tokenizer's own chat template, cut where the trained spans begin and end."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from .._errors import InputError
from .._tokenizer import Tokenizer
from ._jinja import Tools, marks_generation, render, template_source
from ._turns import Message

_ANSWER = "\ue0f2"
"""Stands for an answer where the text around it is looked for."""


class Segment(NamedTuple):
    """A stretch of text that is encoded on its own; `trained` if the model is to write it."""

    text: str
    trained: bool


def rendered(messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()) -> list[Segment]:
    """A conversation in segments; those of the assistant end with what ends a turn.

    Args:
        messages: The turns, in order.
        tokenizer: Gives the template.
        tools: What the conversation may call.

    Raises:
        InputError: if the template fails, or does not tell what the assistant writes.
    """
    text, marked = render(messages, tokenizer, tools)
    answers = [m for m in messages if m.role == "assistant"]
    if marks_generation(tokenizer, tools):
        if len(marked) != len(answers):
            raise InputError(
                f"chat template: marks {len(marked)} answers with generation where the"
                f" conversation has {len(answers)}; give template: chatml"
            )
        spans = marked
    else:
        spans = _spans_by_prefix(messages, text, tokenizer, tools)
    text, spans = _ended(text, spans, messages, tokenizer)
    result, last = [], 0
    for (start, end), answer in zip(spans, answers, strict=True):
        result += [Segment(text[last:start], False), Segment(text[start:end], answer.trained)]
        last = end
    return [s for s in [*result, Segment(text[last:], False)] if s.text]


def rendered_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()
) -> list[Segment]:
    """What stands before the answer to the last turn, cut as in training where that is possible."""
    text, _ = render(messages, tokenizer, tools, prompt=True)
    before: list[Segment] = []
    if any(m.role == "assistant" for m in messages):
        before = rendered(messages, tokenizer, tools)
        before = before[:-1] if not before[-1].trained else before
    done = "".join(segment.text for segment in before)
    if not text.startswith(done):
        return [Segment(text, False)]
    return [*before, Segment(text[len(done) :], False)]


def turn_end(tokenizer: Tokenizer) -> str:
    """The token that the template writes right after an answer; empty where it is another text.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> backend = Backend(models.WordLevel({"yes": 0}, unk_token="yes"))
        >>> backend.add_tokens(["<|im_end|>"])
        1
        >>> template = "{% for m in messages %}{{ m.content }}<|im_end|> {% endfor %}"
        >>> turn_end(Tokenizer(backend, {}, chat_template=template))
        '<|im_end|>'
    """
    ids = tokenizer.encode(written_after_answer(tokenizer).strip())[:1]
    return "".join(tokenizer.backend.id_to_token(i) for i in ids if i in tokenizer.added_ids)


def written_after_answer(tokenizer: Tokenizer) -> str:
    """What the template writes after the last answer; empty where no short talk is allowed."""
    named = tuple(sorted(tokenizer.special_tokens.items()))
    return _written_after(template_source(tokenizer), named)


@functools.lru_cache(maxsize=8)
def _written_after(source: str, named: tuple[tuple[str, str], ...]) -> str:
    tokenizer = Tokenizer(None, dict(named), chat_template=source)
    talk = [Message("user", "a"), Message("assistant", _ANSWER)]
    try:
        text, _ = render(talk, tokenizer)
    except InputError:  # It is said where a real conversation is refused.
        return ""
    return text.rpartition(_ANSWER)[2]


def _spans_by_prefix(
    messages: Sequence[Message], text: str, tokenizer: Tokenizer, tools: Tools
) -> list[tuple[int, int]]:
    """Where the answers stand, found by rendering more and more of the conversation.

    What was rendered for the first turns is how the whole text begins, or it ends like a part of
    the text: a template may leave the thoughts out that led to earlier answers.
    """
    numbers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    starts: list[int] = []
    for number in numbers:
        before, _ = render(messages[:number], tokenizer, tools, prompt=True)
        starts.append(_place(before, text, starts[-1] if starts else 0, len(text)))
    spans = []
    for number, start, most in zip(numbers, starts, [*starts[1:], len(text)], strict=True):
        whole = text
        if number + 1 < len(messages):
            whole, _ = render(messages[: number + 1], tokenizer, tools)
        end = _place(whole[: _end_of_turn(whole, tokenizer)], text, start, most)
        if not (start < end <= most and _says(text[start:end], messages[number])):
            raise InputError(
                f"chat template: turn {number + 1} changes the text before it, so what to"
                " train on cannot be told; mark it with {% generation %}, or give template:"
                " chatml"
            )
        spans.append((start, end))
    return spans


def _place(part: str, text: str, least: int, most: int) -> int:
    """Where in `text` the end of `part` stands: the longer they agree before it, the better."""
    if text.startswith(part):
        return len(part)
    return max(range(least, most + 1), key=lambda end: _agreement(part, text, end), default=most)


def _agreement(part: str, text: str, end: int) -> int:
    """How many characters before `end` are those that `part` ends with."""
    length = 0
    while length < min(len(part), end) and part[-1 - length] == text[end - 1 - length]:
        length += 1
    return length


def _says(span: str, message: Message) -> bool:
    """Whether the span holds the answer, or what comes after the thoughts in it."""
    calls = message.more.get("tool_calls") or []
    names = [str(call.get("function", call).get("name", "")) for call in calls]
    answer = message.text.rpartition("</think>")[2].strip()
    return all(part in span for part in [answer, *names])


def _end_of_turn(text: str, tokenizer: Tokenizer) -> int:
    """Where the last turn ends, without what a template writes after its mark."""
    after, mark = written_after_answer(tokenizer), turn_end(tokenizer)
    if mark and text.endswith(after):
        return len(text) - len(after) + after.index(mark) + len(mark)
    stripped = text.rstrip()
    return len(stripped) if _ends_with_mark(stripped, tokenizer) else len(text)


def _ended(
    text: str, spans: list[tuple[int, int]], messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """Add the end of sequence to a template that ends its last answer with no mark at all."""
    if messages[-1].role != "assistant" or _ends_with_mark(text.rstrip(), tokenizer):
        return text, spans
    end = spans[-1][1]
    text = text[:end] + end_of_sequence(tokenizer)
    return text, [*spans[:-1], (spans[-1][0], len(text))]


def end_of_sequence(tokenizer: Tokenizer) -> str:
    """The text of the tokenizer's own end of sequence.

    Raises:
        InputError: if it names none.
    """
    if tokenizer.eos_id is None:
        raise InputError(
            "the tokenizer names no end of sequence, so no answer would ever end; set eos_token"
            " in tokenizer_config.json"
        )
    return tokenizer.special_tokens["eos_token"]


def _ends_with_mark(text: str, tokenizer: Tokenizer) -> bool:
    ends = (*tokenizer.special_texts, turn_end(tokenizer))
    return any(end and text.endswith(end) for end in ends)
