"""What a client asks for, and what it gets while the engine works on it."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from .._errors import InputError
from .._tokenizer import Tokenizer
from ..models import Chosen, Completion, RowParams, SamplingParams, TextRow, TokenLogprobs
from ._scheduler import Job

Ending = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued.

    Args:
        prompt: A text, which begins with the BOS token where the model wants one, or token ids.
        adapter: The name of one that the engine knows; None is the plain base.
        max_new_tokens: Tokens to add at most.
        sampling: How tokens are chosen, greedily by default; one value for each field.  Where it
            samples and names no seed, one is drawn.
        stop: Texts that end the answer, which is cut before them.
        stop_ids: Tokens that end it; those of the tokenizer by default.
        logprobs: Tell the log-probability of each token, and of this many of the likeliest ones
            in its place (0 to 20).
        timeout: Seconds from `submit` after which the answer ends where it is.

    Example:
        >>> Request("def add(a, b):", sampling=SamplingParams(temperature=0.7, seed=1)).adapter
    """

    prompt: str | Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 128
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop: str | Sequence[str] = ()
    stop_ids: Iterable[int] | None = None
    logprobs: int | None = None
    timeout: float | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """One more token of an answer, or its end.

    Args:
        text: What is certain of the text now and was not before; often empty.
        token: The token, None where an answer ends without one.
        logprobs: Its log-probability, if asked for.
        ending: Why the answer ends, in its last event: `stop` after a stop string or id, `length`
            after the last token that was allowed, `cancelled`, `deadline`, `error`.
        error: What went wrong, in one line.
    """

    text: str = ""
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    ending: Ending | None = None
    error: str | None = None


class Ticket:
    """An answer that grows: an iterator of events, of which the last has an `ending`."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        cancel: Callable[["Ticket"], None],
        on_event: Callable[[Event], None] | None,
    ) -> None:
        wait, prompt = request.timeout, request.prompt
        if wait is not None and not wait >= 0:
            raise InputError(f"timeout must be at least 0, got {wait}")
        if isinstance(prompt, str):
            prompt = tokenizer.with_bos(tokenizer.encode(prompt))
        self.request = request
        self.job = Job(tuple(int(token) for token in prompt), holder=self)
        self.params = _row_params(request.sampling)
        self.deadline = None if wait is None else time.monotonic() + wait
        self.reused_tokens = 0
        """Tokens of the prompt that another request had read before."""
        options = (request.stop, request.stop_ids, request.logprobs, request.max_new_tokens)
        self._row = TextRow(tokenizer, *options)
        self._cancel, self._on_event = cancel, on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.job.prompt)

    @property
    def completion(self) -> Completion:
        """The text so far and all that is known of it."""
        return self._row.completion()

    def cancel(self) -> None:
        """Let the answer end where it is; one that has ended stays as it is."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            event = self._events.get()
            self._ended = event.ending is not None
            yield event

    def push(self, chosen: Chosen, place: int, at: int) -> Event:
        """Add a token to the text; what there is to tell of it."""
        given, row = len(self._row.text), self._row
        row.push(chosen, place, at)
        return Event(row.text[given:], row.tokens[-1], row.last_logprobs, row.finish_reason)

    def give(self, event: Event) -> None:
        """Tell the client; one who cannot be told any more asks for nothing more."""
        self._events.put(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            self._on_event = None
            self.cancel()


def _row_params(sampling: SamplingParams) -> RowParams:
    """A request's own values, with a seed drawn where it needs one and names none."""
    if sampling.samples and sampling.seed is None:
        seed = int(np.random.default_rng().integers(2**63))
        sampling = dataclasses.replace(sampling, seed=seed)
    return RowParams.of(sampling, 1, 1, None)
