"""How a conversation becomes text: segments that are trained on, and segments that are not."""

from collections.abc import Sequence

from .._errors import InputError, nearest
from .._tokenizer import Tokenizer
from ._jinja import Tools
from ._rendered import Segment, end_of_sequence, rendered, rendered_prompt, turn_end
from ._rows import Rows
from ._turns import Message

TEMPLATES = ("tokenizer", "alpaca", "chatml", "plain")
_PREAMBLE = "Below is an instruction. Write a response that carries it out."
_PREAMBLE_INPUT = (
    "Below is an instruction, and an input to apply it to. Write a response that carries it out."
)


def choose_template(name: str, rows: Rows | None, tokenizer: Tokenizer) -> str:
    """The template that `name` stands for.

    `"auto"` is the tokenizer's own where it has one, else `alpaca`; rows of `prompt` and
    `completion` are texts that are already written out, so for them it is `plain`.

    Raises:
        InputError: if there is no such template, or the tokenizer has none.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> choose_template("auto", None, Tokenizer(Backend(models.BPE()), {}))
        'alpaca'
    """
    if name not in ("auto", *TEMPLATES):
        raise InputError(
            f"data: template {name!r} is unknown{nearest(name, TEMPLATES)}; use auto or one of"
            f" {', '.join(TEMPLATES)}"
        )
    if name == "tokenizer" and not tokenizer.chat_template:
        raise InputError(
            "data: template 'tokenizer', but the tokenizer has no chat template; use alpaca or"
            " chatml"
        )
    if name != "auto":
        return name
    if rows is not None and rows.format == "prompt_completion":
        return "plain"
    return "tokenizer" if tokenizer.chat_template else "alpaca"


def segments(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, tools: Tools = ()
) -> list[Segment]:
    """Lay a conversation out as segments; those of the assistant end with the end of turn.

    The segments of a conversation's first turns do not depend on the later ones.

    Args:
        messages: The turns, in order.
        template: One of `TEMPLATES` (see `choose_template`).
        tokenizer: Gives the special tokens, and the template `"tokenizer"`.
        tools: What the conversation may call, which only the template `"tokenizer"` can show.

    Raises:
        InputError: if the tokenizer has no end of sequence, or its template cannot be used.
    """
    if template == "tokenizer":
        return rendered(messages, tokenizer, tools)
    result: list[Segment] = []
    for number, message in enumerate(messages):
        trained = message.role == "assistant"
        if trained:
            result.append(Segment(_opening(messages[:number], template, tokenizer), False))
            result.append(Segment(message.written + _end(template, tokenizer), message.trained))
    return result


def text_segments(text: str, tokenizer: Tokenizer) -> list[Segment]:
    """A plain text: trained on as a whole, the end of sequence included."""
    return [Segment(text, True), Segment(end_of_sequence(tokenizer), True)]


def prompt_segments(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, tools: Tools = ()
) -> list[Segment]:
    """What stands before the answer to the last turn, exactly as in training."""
    if template == "tokenizer":
        return rendered_prompt(messages, tokenizer, tools)
    before = segments(messages, template, tokenizer)
    return [*before, Segment(_opening(messages, template, tokenizer), False)]


def prompt_text(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, tools: Tools = ()
) -> str:
    """The text to generate from: the turns so far and the opening of the answer.

    Args:
        messages: The turns, the last one the user's.
        template: One of `TEMPLATES` (see `choose_template`).
        tokenizer: The model's tokenizer.
        tools: What the conversation may call.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> tokenizer = Tokenizer(Backend(models.BPE()), {})
        >>> print(prompt_text([Message("user", "Say hello.")], "alpaca", tokenizer))
        Below is an instruction. Write a response that carries it out.
        <BLANKLINE>
        ### Instruction:
        Say hello.
        <BLANKLINE>
        ### Response:
        <BLANKLINE>
    """
    return "".join(s.text for s in prompt_segments(messages, template, tokenizer, tools))


def encode_prompt(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, tools: Tools = ()
) -> list[int]:
    """Token ids to generate from: the same that stand before the answer in training.

    Args:
        messages: The turns, the last one the user's.
        template: One of `TEMPLATES` (see `choose_template`).
        tokenizer: The model's tokenizer.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> backend = Backend(models.WordLevel({"Ready?": 0, "yes": 1}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=2)
        >>> encode_prompt([Message("user", "Ready?")], "plain", tokenizer)
        [0]
    """
    pieces = [s.text for s in prompt_segments(messages, template, tokenizer, tools)]
    ids = [i for piece in tokenizer.encode_segments([pieces])[0] for i in piece]
    return tokenizer.with_bos(ids)


def stop_ids(template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the model's own, and the mark that the template ends a turn with.

    Args:
        template: One of `TEMPLATES` (see `choose_template`).
        tokenizer: The model's tokenizer.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> backend = Backend(models.WordLevel({"Ready?": 0, "yes": 1}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=2)
        >>> stop_ids("alpaca", tokenizer)
        (2,)
    """
    end = turn_end(tokenizer) if template == "tokenizer" else _end(template, tokenizer)
    mark = tokenizer.token_id(end) if end else None
    return tuple(sorted({*tokenizer.stop_ids, *([] if mark is None else [mark])}))


def _opening(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> str:
    """The text from the end of the last answer up to where the next one begins."""
    last = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1)
    turns = messages[last + 1 :]
    layout = {"alpaca": _alpaca, "chatml": _chatml, "plain": _plain}[template]
    return layout(turns, last < 0, tokenizer)


def _alpaca(turns: Sequence[Message], first: bool, tokenizer: Tokenizer) -> str:
    systems = [m.content for m in turns if m.role == "system"]
    usual = _PREAMBLE_INPUT if any(m.input for m in turns) else _PREAMBLE
    parts = ["\n\n".join(systems) or usual] if first or systems else []
    for message in turns:
        if message.role == "user":
            parts.append(f"### Instruction:\n{message.content}")
        if message.role == "tool":
            parts.append(f"### Result:\n{message.content}")
        if message.input:
            parts.append(f"### Input:\n{message.input}")
    text = "\n\n".join([*parts, "### Response:\n"])
    return text if first else f"\n\n{text}"


def _chatml(turns: Sequence[Message], first: bool, tokenizer: Tokenizer) -> str:
    end = _end("chatml", tokenizer)
    text = "".join(f"<|im_start|>{m.role}\n{m.text}{end}\n" for m in turns)
    return f"{'' if first else chr(10)}{text}<|im_start|>assistant\n"


def _plain(turns: Sequence[Message], first: bool, tokenizer: Tokenizer) -> str:
    """What the rows say and nothing else: a completion follows its prompt directly.

    Only an instruction's input ends its line, since nothing written there leads to the answer.
    """
    text = "\n".join(f"{m.text}\n" if m.input else m.text for m in turns)
    return text if first else f"\n{text}"


def _end(template: str, tokenizer: Tokenizer) -> str:
    """The text of the token that ends a turn."""
    if template == "chatml" and tokenizer.token_id("<|im_end|>") is not None:
        return "<|im_end|>"
    return end_of_sequence(tokenizer)
