"""Text in, text out: stop strings, log-probabilities, pieces as they come."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from .._errors import InputError
from .._text_stream import TextStream
from .._tokenizer import Tokenizer
from .._typing import Params
from ._decoding import CHUNK, MOST_LOGPROBS, Chosen, Decoding
from ._sampling import SamplingParams

FinishReason = Literal["stop", "length"]
_BETWEEN_LOOKS = 8
"""Tokens after which stop strings are looked for, where nobody waits for the pieces."""
_SECONDS = 0.1
"""How long a chunk of a stream should take."""


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The natural log-probability of a token, and the likeliest tokens in its place with theirs.

    They are of the model's own distribution: before penalties, temperature and truncation.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Args:
        text: Without the stop string, and without marks such as `</s>`.
        tokens: All tokens that were generated, those of the stop included.
        finish_reason: `stop` after a stop string or a stop id, `length` after the last token
            that was allowed, None for a text that nobody waited for.
        logprobs: One for each token, if they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


def generate_text(
    module: Any,
    params: Params,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Iterable[int] | None = None,
    logprobs: int | None = None,
    cache_dtype: str | None = None,
) -> list[Completion]:
    """Continue each prompt.

    Args:
        module: A `CausalLM`, or one wrapped by `lora_linen`.
        params: Its parameters.
        tokenizer: The model's tokenizer.
        prompts: Texts, which begin with the BOS token where the model wants one, or token ids.
        max_new_tokens: Tokens to add at most, to all prompts or one number for each.
        sampling: How tokens are chosen; greedily by default.
        stop: Texts that end a completion, which is cut before them.
        stop_ids: Tokens that end it; those of the tokenizer by default.
        logprobs: Tell the log-probability of each token, and of this many of the likeliest
            ones in its place (0 to 20).
        cache_dtype: As in `generate`.

    Returns:
        A completion for each prompt.

    Raises:
        InputError: as `generate` does, and for an empty stop string or too many `logprobs`.

    Example:
        >>> from lora_jax.models import bundled_model, load_pretrained
        >>> base = load_pretrained(bundled_model())
        >>> [answer] = generate_text(
        ...     base.module, base.params, base.tokenizer, "def add(a, b):", max_new_tokens=8,
        ...     stop="\\n\\n", logprobs=0)
        >>> len(answer.tokens) == len(answer.logprobs), answer.finish_reason
        (True, 'length')
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [TextRow(tokenizer, stop, stop_ids, logprobs) for _ in texts]
    if not rows:
        return []
    decoding = _decoding(
        module, params, tokenizer, texts, rows, max_new_tokens, sampling, cache_dtype
    )
    count = _BETWEEN_LOOKS if rows[0].stops else CHUNK
    while decoding.running:
        _give(decoding, rows, decoding.more(count))
    return [row.completion() for row in rows]


def stream_text(
    module: Any,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Iterable[int] | None = None,
    logprobs: int | None = None,
    cache_dtype: str | None = None,
) -> "StreamedText":
    """Continue a prompt and give the text in pieces as they come; see `generate_text`.

    Pieces are whole characters and hold nothing of a stop string.  The first comes after the
    prompt was read, later ones about ten times in a second.

    Returns:
        An iterator over pieces; its `completion` is what `generate_text` would have returned.

    Example:
        >>> from lora_jax.models import bundled_model, load_pretrained
        >>> base = load_pretrained(bundled_model())
        >>> answer = stream_text(base.module, base.params, base.tokenizer, "def add(a, b):")
        >>> "".join(answer) == answer.completion.text
        True
    """
    row = TextRow(tokenizer, stop, stop_ids, logprobs)
    decoding = _decoding(
        module, params, tokenizer, [prompt], [row], max_new_tokens, sampling, cache_dtype
    )
    return StreamedText(row, decoding)


class StreamedText:
    """Pieces of a text as they come, and all that is known of it so far."""

    def __init__(self, row: "TextRow", decoding: Decoding) -> None:
        self._row = row
        self._pieces = _pieces(row, decoding)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The text so far; its `finish_reason` is None until it has ended."""
        return self._row.completion()


def _pieces(row: "TextRow", decoding: Decoding) -> Iterator[str]:
    count = 1
    while decoding.running:
        start, given = time.perf_counter(), len(row.text)
        _give(decoding, [row], decoding.more(count))
        if piece := row.text[given:]:
            yield piece
        # What one chunk took tells how many tokens the next may have.
        taken = time.perf_counter() - start
        count = max(1, min(2 * count, int(count * _SECONDS / taken), CHUNK))


def _decoding(
    module: Any,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    rows: Sequence["TextRow"],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | None,
    cache_dtype: str | None,
) -> Decoding:
    ids = [tokenizer.with_bos(tokenizer.encode(p)) if isinstance(p, str) else p for p in prompts]
    decoding = Decoding(
        module,
        params,
        ids,
        sampling or SamplingParams(),
        max_new_tokens=max_new_tokens,
        end_ids=rows[0].ends,
        pad_id=tokenizer.pad_id or 0,
        logprobs=rows[0].alternatives is not None,
        cache_dtype=cache_dtype,
    )
    for row, limit in zip(rows, decoding.limits, strict=True):
        row.limit = limit
    return decoding


def _give(decoding: Decoding, rows: Sequence["TextRow"], chosen: Chosen) -> None:
    """Hand each row its new tokens; end those that found a stop string."""
    for number, row in enumerate(rows):
        for at in range(chosen.token.shape[1]):
            if row.finish_reason is None:
                row.push(chosen, number, at)
        if row.finish_reason == "stop":
            decoding.end(number)


class TextRow:
    """A completion in the making."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str],
        stop_ids: Iterable[int] | None,
        alternatives: int | None,
        limit: int = 0,
    ) -> None:
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stops:
            raise InputError("stop: a stop string is empty, which would stop at once")
        if alternatives is not None and not 0 <= alternatives <= MOST_LOGPROBS:
            raise InputError(f"logprobs must be from 0 to {MOST_LOGPROBS}, got {alternatives}")
        self.ends = frozenset(tokenizer.stop_ids if stop_ids is None else stop_ids)
        self.alternatives = alternatives
        self.limit = limit
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._held = ""
        self._stream = TextStream(tokenizer)
        self._logprobs: list[TokenLogprobs] = []

    def push(self, chosen: Chosen, row: int, at: int) -> None:
        """Take one more token."""
        token = int(chosen.token[row, at])
        self.tokens.append(token)
        if self.alternatives is not None:
            own = float(chosen.logprob[row, at])
            top = slice(0, self.alternatives)
            pairs = zip(
                chosen.top_token[row, at, top], chosen.top_logprob[row, at, top], strict=True
            )
            self._logprobs.append(
                TokenLogprobs(token, own, tuple((int(i), float(p)) for i, p in pairs))
            )
        ended = token in self.ends
        self._add("" if ended else self._stream.push(token))
        if self.finish_reason is None and (ended or len(self.tokens) == self.limit):
            self.finish_reason = "stop" if ended else "length"
            self._add(self._stream.finish())
            self.text, self._held = self.text + self._held, ""

    def _add(self, piece: str) -> None:
        shown, self._held, found = before_stop(self._held + piece, self.stops)
        self.text += shown
        if found:
            self.finish_reason = "stop"

    @property
    def last_logprobs(self) -> TokenLogprobs | None:
        """Those of the last token, if they were asked for."""
        return self._logprobs[-1] if self._logprobs else None

    def completion(self) -> Completion:
        """All that is known of the text so far."""
        logprobs = None if self.alternatives is None else tuple(self._logprobs)
        return Completion(self.text, tuple(self.tokens), self.finish_reason, logprobs)


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Text before the first stop string, what may yet become one, and whether one was found.

    The first is the one that ends first, so that it does not matter in which pieces text comes.

    Example:
        >>> before_stop("one two", ["two"]), before_stop("one tw", ["two"])
        (('one ', '', True), ('one ', 'tw', False))
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)[1]], "", True
    most = len(text) + 1
    ends = (n for s in stops for n in range(1, min(len(s), most)) if text.endswith(s[:n]))
    border = len(text) - max(ends, default=0)
    return text[:border], text[border:], False
