"""Rows to token ids, and for each token whether it is trained on."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from .._errors import InputError, nearest
from .._tokenizer import Tokenizer
from ._checks import template_problems
from ._jinja import template_source
from ._rendered import Segment
from ._rows import Row, Rows
from ._template import choose_template, segments, stop_ids, text_segments
from ._turns import Message

TRAIN_ON = ("answer", "last", "all")
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence.

    Args:
        input_ids: Token ids.
        loss_mask: True where this token is a target that is trained on; never at the first
            token, which nothing predicts.
        row: Index of the row it comes from.
    """

    input_ids: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the rows.

    Args:
        rows: Rows that came in.
        examples: Sequences that came out.
        tokens, trained_tokens: Their tokens, and those of them that are trained on.
        truncated: Rows cut off at `max_length`.
        split: Plain texts cut into several sequences.
        dropped: Reason to count of rows that gave no sequence.
        lengths: (upper bound, count) of sequences by length; the bounds are powers of two.
        notes: Things worth knowing, a sentence each.
    """

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int
    split: int
    dropped: Mapping[str, int]
    lengths: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Examples:
    """Sequences ready to be packed, with the template that made them and a report."""

    examples: tuple[Example, ...]
    report: Report
    template: str

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def digest_of(examples: Iterable[Example], options: str = "") -> str:
    """Tells sequences, in their order, from any others; `options` are what else may differ."""
    digest = hashlib.sha256(options.encode())
    for example in examples:
        digest.update(example.input_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def build_examples(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: str = "auto",
    train_on: str = "answer",
    max_length: int | None = None,
) -> Examples:
    """Turn rows into token ids and loss masks.

    Each segment of a template is encoded on its own, so the mask is exact, and the tokens of a
    prompt are the same as when it is generated from.

    Args:
        rows: What `read_rows` gave.
        tokenizer: The model's tokenizer.
        template: `"auto"`, or one of `TEMPLATES`.
        train_on: `"answer"`: every answer and its end of turn; `"last"`: the last answer only;
            `"all"`: every token but the first.  A plain text is always trained on whole.
        max_length: Longest sequence, in tokens.  A conversation is cut off there, and dropped
            if nothing to train on is left; a plain text is cut into several sequences.

    Returns:
        The sequences in the order of the rows, and a report.

    Raises:
        InputError: if an option is unknown, a template fails, or no trained token is left.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> backend = Backend(models.WordLevel({"Ready?": 0, "yes": 1}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=2)
        >>> from lora_jax.data import Message, Row, Rows
        >>> talk = (Message("user", "Ready?"), Message("assistant", "yes"))
        >>> row = Row(talk, "", 0, "here")
        >>> rows = Rows((row,), "prompt_completion", "here", {})
        >>> [example] = build_examples(rows, tokenizer)
        >>> example.input_ids.tolist(), example.loss_mask.tolist()
        ([0, 1, 2], [False, True, True])
    """
    if train_on not in TRAIN_ON:
        raise InputError(
            f"data: train_on {train_on!r} is unknown{nearest(train_on, TRAIN_ON)}; use one of"
            f" {', '.join(TRAIN_ON)}"
        )
    if max_length is not None and max_length < 2:
        raise InputError(f"data: max_length must be at least 2, got {max_length}")
    chosen = choose_template(template, rows, tokenizer)
    examples: list[Example] = []
    truncated, split, dropped, endless = 0, 0, Counter(), 0
    ends = _ends(rows, chosen, tokenizer)
    for start in range(0, len(rows), _CHUNK):
        part = rows.rows[start : start + _CHUNK]
        for row, whole in zip(part, _tokenize(part, tokenizer, chosen, train_on), strict=True):
            endless += not row.text and not _ends_turn(whole, ends)
            pieces = _fitted(whole, max_length, cut=not row.text)
            kept = [piece for piece in pieces if piece.loss_mask.any()]
            truncated += bool(kept and row.messages) and len(kept[0]) < len(whole)
            split += len(pieces) > 1
            examples += kept
            if not kept:
                dropped[_why_dropped(whole)] += 1
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise InputError(
            f"{rows.source}: no token is left to train on ({reasons}); raise max_length, or use"
            " another template or train_on"
        )
    notes = (*_notes(endless, rows, chosen, tokenizer), *_problems(rows, chosen, tokenizer))
    report = _report(rows, examples, truncated, split, dropped, notes)
    return Examples(tuple(examples), report, chosen)


def tokenize(row: Row, tokenizer: Tokenizer, *, template: str, train_on: str = "answer") -> Example:
    """Token ids and loss mask of one row, whole.

    Args:
        row: A conversation or a plain text.
        tokenizer: The model's tokenizer.
        template: One of `TEMPLATES` (see `choose_template`).
        train_on: As in `build_examples`.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> backend = Backend(models.WordLevel({"Ready?": 0, "yes": 1}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=2)
        >>> from lora_jax.data import Message, Row, Rows
        >>> talk = (Message("user", "Ready?"), Message("assistant", "yes"))
        >>> row = Row(talk, "", 0, "here")
        >>> tokenize(row, tokenizer, template="plain").input_ids.tolist()
        [0, 1, 2]
    """
    return _tokenize([row], tokenizer, template, train_on)[0]


def _tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, template: str, train_on: str
) -> list[Example]:
    laid_out = [_laid_out(row, tokenizer, template, train_on) for row in rows]
    encoded = tokenizer.encode_segments([[s.text for s in parts] for parts in laid_out])
    return [
        _example(row, parts, ids, tokenizer)
        for row, parts, ids in zip(rows, laid_out, encoded, strict=True)
    ]


def _laid_out(row: Row, tokenizer: Tokenizer, template: str, train_on: str) -> list[Segment]:
    try:
        if not row.messages:
            return text_segments(row.text, tokenizer)
        parts = segments(_counted(row.messages, train_on), template, tokenizer, row.tools)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
    if train_on == "all":
        return [Segment(part.text, True) for part in parts]
    return parts


def _counted(messages: Sequence[Message], train_on: str) -> list[Message]:
    """The turns, of which `train_on: last` trains no answer but the last."""
    last = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1)
    return [
        dataclasses.replace(message, trained=message.trained and (train_on != "last" or n == last))
        for n, message in enumerate(messages)
    ]


def _example(
    row: Row, parts: Sequence[Segment], ids: Sequence[list[int]], tokenizer: Tokenizer
) -> Example:
    flat = [i for piece in ids for i in piece]
    mask = [part.trained for part, piece in zip(parts, ids, strict=True) for _ in piece]
    whole = tokenizer.with_bos(flat)
    mask = [False] * (len(whole) - len(flat)) + mask
    # Nothing comes before the first token, so nothing can predict it.
    mask[:1] = [False]
    return Example(np.array(whole, np.int32), np.array(mask, bool), row.index)


def _fitted(example: Example, max_length: int | None, *, cut: bool) -> list[Example]:
    """The example within `max_length`: cut off, or for a plain text in consecutive pieces."""
    if max_length is None or len(example) <= max_length:
        return [example]
    # Pieces share a token: what begins one is the target that ends the piece before.
    starts = [0] if cut else range(0, len(example) - 1, max_length - 1)
    return [_piece(example, start, start + max_length) for start in starts]


def _piece(example: Example, start: int, stop: int) -> Example:
    mask = example.loss_mask[start:stop].copy()
    mask[0] = False
    return Example(example.input_ids[start:stop], mask, example.row)


def _why_dropped(whole: Example) -> str:
    if whole.loss_mask.any():
        return "answer beyond max_length"
    return "nothing to train on in it"


def _ends(rows: Rows, template: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a turn."""
    if rows.format == "text":
        return tokenizer.special_ids
    return tokenizer.special_ids.union(stop_ids(template, tokenizer))


def _ends_turn(example: Example, ends: frozenset[int]) -> bool:
    """Whether a mark that ends a turn is trained on after the last answer."""
    trained = np.flatnonzero(example.loss_mask)
    return not len(trained) or int(example.input_ids[trained[-1]]) in ends


def _problems(rows: Rows, template: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    return () if rows.format == "text" else template_problems(template, tokenizer)


def _notes(endless: int, rows: Rows, template: str, tokenizer: Tokenizer) -> list[str]:
    notes = []
    if endless:
        notes.append(
            f"{endless} of {len(rows)} rows train on no end of turn: the model will not learn to"
            " stop (the template's generation block should hold the mark that ends a turn)"
        )
    with_tools = [row for row in rows if row.tools]
    source = template_source(tokenizer, with_tools[0].tools if with_tools else ())
    shown = source if template == "tokenizer" else ""
    if with_tools and "tools" not in shown:
        notes.append(f"the tools of {len(with_tools)} rows are not shown by the template")
    # A template is given whatever a turn holds, and takes what it names.
    unused = [name for name in rows.unused if "." not in name or name.split(".")[-1] not in shown]
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    return notes


def _report(
    rows: Rows,
    examples: Sequence[Example],
    truncated: int,
    split: int,
    dropped: Mapping[str, int],
    notes: tuple[str, ...],
) -> Report:
    bounds = Counter(1 << (len(example) - 1).bit_length() for example in examples)
    return Report(
        rows=len(rows) + sum(rows.dropped.values()),
        examples=len(examples),
        tokens=sum(len(example) for example in examples),
        trained_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        truncated=truncated,
        split=split,
        dropped={**rows.dropped, **dropped},
        lengths=tuple(sorted(bounds.items())),
        notes=notes,
    )
