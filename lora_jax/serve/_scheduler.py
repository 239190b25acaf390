"""Which request has which row, and what the next step does: a data structure without a model.

First come, first served.  A request waits for a row and for its adapter's slot; while the adapter
is read, those behind it may pass, but where all slots are in use none does, so that rows run dry
and a slot becomes free.  Every row ends, by its limit at the latest: nobody waits for ever.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import Enum
from typing import Any

from ..lora import PLAIN

LEAST_COPY = 16
"""Tokens of a common beginning for which a row is copied rather than read again."""


class QueueFullError(Exception):
    """As many requests wait as may: try again later."""


class Wait(Enum):
    """Why a request cannot start yet: its adapter is being read, or has no slot to be in."""

    READING = "reading"
    NO_SLOT = "no slot"


@dataclasses.dataclass(eq=False)
class Job:
    """A request as the scheduler sees it.

    `adapter` names the adapter and its version, None the plain base.  `text` holds the tokens that
    were chosen.  `holder` is whoever is to be told.
    """

    prompt: tuple[int, ...]
    adapter: Hashable | None = None
    holder: Any = None
    text: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the batch: what its part of the cache holds, and whose it is.

    `tokens` are those whose keys and values are there, computed through `adapter` in `slot`; they
    stay when a request ends, for one that begins in the same way.
    """

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    adapter: Hashable | None = None
    slot: int = PLAIN
    job: Job | None = None
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens that a row reads in a step, for the request that has it when the step begins.

    `start`: how many are in the row before.  `last`: whether they are the last that are known, so
    that another is chosen.
    """

    row: Row
    job: Job
    tokens: tuple[int, ...]
    start: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Start:
    """A request got a row, where the first `reused` tokens are known once `source` is copied."""

    row: Row
    job: Job
    reused: int
    source: Row | None


class Scheduler:
    """Rows and those who wait for them.

    Args:
        rows: How many rows there are.
        waiting: How many requests may wait, beside those for whom a row is free.
        chunk: Tokens of a prompt that one step reads, at most.

    Example:
        >>> scheduler = Scheduler(rows=1, waiting=8, chunk=2)
        >>> for prompt in ((5, 6, 7), (5, 6, 8, 9)):
        ...     scheduler.submit(Job(prompt))
        >>> [start] = scheduler.admit(lambda adapter: -1)
        >>> scheduler.prompt_part().tokens
        (5, 6)
    """

    def __init__(self, rows: int, waiting: int, chunk: int) -> None:
        self.rows = tuple(Row(number) for number in range(rows))
        self.waiting: list[Job] = []
        self._most, self._chunk, self._clock = waiting, chunk, 0

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows that somebody has."""
        return tuple(row for row in self.rows if row.job is not None)

    @property
    def jobs(self) -> list[Job]:
        """All requests, those with rows first."""
        return [row.job for row in self.rows if row.job is not None] + self.waiting

    def submit(self, *jobs: Job) -> None:
        """Let requests wait, all of them or none.

        Raises:
            QueueFullError: if too many do.
        """
        free = len(self.rows) - len(self.running)
        if len(self.waiting) + len(jobs) > self._most + free:
            raise QueueFullError(f"{len(self.waiting)} requests wait, and no more may")
        self.waiting.extend(jobs)

    def admit(self, slot_of: Callable[[Any], int | Wait]) -> list[Start]:
        """Give free rows to those who wait.

        Args:
            slot_of: The slot of an adapter, in use by one more then, or why there is none.
        """
        starts = []
        for job in list(self.waiting):
            if len(self.running) == len(self.rows):
                break
            slot = slot_of(job.adapter)
            if slot is Wait.NO_SLOT:
                break
            if isinstance(slot, int):
                self.waiting.remove(job)
                starts.append(self._start(job, slot))
        return starts

    def prompt_part(self) -> Part | None:
        """What is read next of a prompt; that of the first who came has its turn."""
        reading = [row for row in self.running if row.job is not None and not row.job.text]
        if not reading:
            return None
        row = min(reading, key=lambda row: row.used)
        assert row.job is not None
        start = len(row.tokens)
        tokens = row.job.prompt[start : start + self._chunk]
        return Part(row, row.job, tokens, start, start + len(tokens) == len(row.job.prompt))

    def text_parts(self) -> list[Part]:
        """The last token of each text, which its row reads for the next."""
        return [
            Part(row, row.job, (row.job.text[-1],), len(row.tokens), True)
            for row in self.rows
            if row.job is not None and row.job.text
        ]

    def read(self, part: Part) -> bool:
        """Note that a row has read tokens, if it still is the request's."""
        if part.row.job is not part.job:
            return False
        part.row.tokens.extend(part.tokens)
        return True

    def end(self, job: Job) -> Row | None:
        """Let a request go, wherever it is; the row that became free."""
        if job in self.waiting:
            self.waiting.remove(job)
            return None
        row = next((row for row in self.rows if row.job is job), None)
        if row is not None:
            row.job, row.slot = None, PLAIN
        return row

    def forget(self, rows: Iterable[Row]) -> None:
        """Note that rows hold nothing of use."""
        for row in rows:
            row.tokens = []

    def _start(self, job: Job, slot: int) -> Start:
        shared = {row: self._shared(row, job) for row in self.rows}
        free = [row for row in self.rows if row.job is None]
        # Of rows that help alike, the one whose content is oldest is overwritten.
        row = max(free, key=lambda row: (shared[row], not row.tokens, -row.used))
        best = max(self.rows, key=lambda row: shared[row])
        source = best if shared[best] >= shared[row] + LEAST_COPY else None
        if source is not None:
            row = max(free, key=lambda row: (not row.tokens, -row.used))
        reused = shared[source or row]
        self._clock += 1
        row.tokens, row.adapter, row.slot = list(job.prompt[:reused]), job.adapter, slot
        row.job, row.used = job, self._clock
        return Start(row, job, reused, source)

    def _shared(self, row: Row, job: Job) -> int:
        """Tokens at the beginning of a prompt that a row holds; the last is read in any case."""
        if row.adapter != job.adapter:
            return 0
        return common_prefix(row.tokens, job.prompt[:-1])


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements two sequences have in common at the beginning.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
