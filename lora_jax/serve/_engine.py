"""One base, many adapters, requests that join and leave one running batch."""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .._config import LoraConfig
from .._errors import InputError, nearest
from .._typing import Params
from ..models import MOST_AT_ONCE, Chosen, ContinuousBatch, Pretrained, laid_out
from ..transform import lora_linen
from ._adapters import Adapter, Shelf
from ._limits import check_lengths, check_sizes
from ._request import Ending, Event, Request, Ticket
from ._scheduler import Job, Part, Scheduler, Start
from ._slots import Slots
from ._stats import Stats
from ._step import assembled

_SECONDS = 0.02
"""How long a step of several tokens may take, so that newcomers do not wait longer."""
_PATIENCE = 0.05
"""Seconds between looks at the deadlines of those who wait while nothing runs."""


class Engine:
    """Answers many requests at once, each through an adapter of its own or the plain base.

    A thread steps one batch of `max_rows` rows.  Between two tokens requests join and leave it;
    a long prompt is read in parts between the tokens of the others.  A request that begins as
    another did, with the same adapter, does not read that beginning again.  Every program is
    compiled before the first request.  One seed gives one text, whatever else is in the batch, as
    far as rounding goes: a batch of another size adds up in another order.  Where positions depend
    on how long a text is (dynamic ropes), each part of a prompt is read as if it were the last.

    Args:
        pretrained: The base, with a tokenizer.
        max_rows: Requests that are answered at one time.
        max_length: Tokens of a request at most, prompt and answer; those that the model was made
            for by default.
        prefill_chunk: Tokens of prompts that are read between two tokens of the others.
        adapter_slots: Adapters that are on the device at one time; others that are known are read
            again when they are asked for.
        max_rank: The largest rank of an adapter.
        target_modules: What adapters may adapt, as in `LoraConfig`.
        use_dora: Whether they may have magnitudes.
        max_waiting: Requests that may wait for a row.
        cache_dtype: As in `generate`.

    Raises:
        InputError: if an argument is out of its range, or there is no tokenizer.

    Example:
        >>> from lora_jax.models import bundled_model, load_pretrained
        >>> base = load_pretrained(bundled_model())
        >>> sizes = dict(max_rows=1, max_length=64, prefill_chunk=16, adapter_slots=0)
        >>> with Engine(base, **sizes) as engine:
        ...     ticket = engine.submit(Request("def add(a, b):", max_new_tokens=8))
        ...     text = "".join(event.text for event in ticket)
        >>> text == ticket.completion.text, len(ticket.completion.tokens)
        (True, 8)

    Source: Yu et al. 2022, "Orca", section 3 (batches that change between tokens); Agrawal et al.
    2023, "SARATHI" (prompts in chunks); Sheng et al. 2023, "S-LoRA" (adapters per row).
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        max_rows: int = 16,
        max_length: int | None = None,
        prefill_chunk: int = 128,
        adapter_slots: int = 8,
        max_rank: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        use_dora: bool = False,
        max_waiting: int = 256,
        cache_dtype: str | None = None,
    ) -> None:
        longest = pretrained.config.context_length
        length = longest if max_length is None else max_length
        check_sizes(max_rows, length, longest, prefill_chunk, adapter_slots, max_waiting)
        if pretrained.tokenizer is None:
            raise InputError(f"{pretrained.directory}: has no tokenizer, and answers are text")
        modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(r=max_rank, target_modules=modules, use_dora=use_dora)
        self._tokenizer = pretrained.tokenizer
        self.max_rows, self.max_length, self.max_waiting = max_rows, length, max_waiting
        module = lora_linen(pretrained.module) if adapter_slots else pretrained.module
        module, params = laid_out(module, pretrained.params)
        self._shelf = Shelf(pretrained, module, config if adapter_slots else None, adapter_slots)
        chunk, dtype = min(prefill_chunk, length), cache_dtype or pretrained.module.dtype
        sizes: dict[str, int] = dict(rows=max_rows, length=length, chunk=chunk)
        slots = self._shelf.slots
        self._batch = ContinuousBatch(module, params, slots, **sizes, cache_dtype=dtype)
        self._known: dict[str, Adapter] = {}
        self._scheduler = Scheduler(max_rows, max_waiting, chunk)
        self._slots = Slots(adapter_slots)
        self._counts: Counter[str] = Counter()
        self._arrived: list[tuple[Adapter, Params | Exception]] = []
        self._news = self._closed = False
        self._at_once = 1
        # Whoever holds it sees, and may change, all that is above.
        self._changed = threading.Condition(threading.RLock())
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def compilations(self) -> int:
        """How many programs there are; none is compiled after the start."""
        return self._batch.compilations

    @property
    def closed(self) -> bool:
        """Whether it has stopped, by itself or by `close`."""
        return self._closed

    @property
    def adapters(self) -> dict[str, Path]:
        """The directories of the adapters that can be asked for, by name."""
        with self._changed:
            return {name: adapter.directory for name, adapter in self._known.items()}

    @property
    def stats(self) -> Stats:
        """What it does now, and how much it did."""
        with self._changed:
            running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
            return Stats(running, waiting, self._slots.filled, **self._counts)

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Ticket:
        """Let a request wait for its turn.

        Args:
            request: What is asked for.
            on_event: Called with each event, from the engine's own thread; it must return at once.

        Raises:
            InputError: if an argument is out of its range, or the adapter is not known.
            QueueFullError: if too many requests wait.
        """
        return self.submit_all([request], [on_event])[0]

    def submit_all(
        self,
        requests: Sequence[Request],
        listeners: Sequence[Callable[[Event], None] | None],
    ) -> list[Ticket]:
        """Let several requests wait, all of them or none: an adapter's name means one to them all.

        Args:
            requests: What is asked for.
            listeners: For each of them as in `submit`.

        Raises: as `submit` does.
        """
        tickets = [
            Ticket(request, self._tokenizer, self._cancel, on_event)
            for request, on_event in zip(requests, listeners, strict=True)
        ]
        for ticket in tickets:
            limit = ticket.request.max_new_tokens
            check_lengths(ticket.job.prompt, limit, self.max_length, self._batch.vocab)
        with self._changed:
            if self._closed:
                raise InputError("submit: the engine is closed; make another")
            for ticket in tickets:
                ticket.job.adapter = self._adapter(ticket.request.adapter)
            self._scheduler.submit(*[ticket.job for ticket in tickets])
            self._notify()
        return tickets

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Let an adapter be asked for by a name; requests in flight keep what the name stood for.

        It is read and checked here, in the caller's thread.

        Raises:
            InputError: as `adapters.load_adapter` does, and if the bank has no room for it.
        """
        adapter, fitted = self._shelf.load(name, directory)
        with self._changed:
            self._forget(name)
            self._known[name] = adapter
            if self._slots.reserve_empty(adapter):
                self._arrived.append((adapter, fitted))
                self._notify()

    def unload_adapter(self, name: str) -> None:
        """Let an adapter no longer be asked for; requests that have it end with it.

        Raises:
            InputError: if there is none of that name.
        """
        with self._changed:
            self._adapter(name)
            self._forget(name)

    def close(self) -> None:
        """Cancel what runs and waits, and stop."""
        with self._changed:
            self._closed = True
            self._notify()
        self._thread.join()
        self._reader.shutdown()

    # What follows is called by whoever holds the lock.

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is not None and name not in self._known:
            there = ", ".join(self._known) or "none"
            raise InputError(f"adapter: no {name!r}{nearest(name, self._known)}; loaded: {there}")
        return None if name is None else self._known[name]

    def _forget(self, name: str) -> None:
        old = self._known.pop(name, None)
        if old is not None and not any(job.adapter == old for job in self._scheduler.jobs):
            self._slots.drop(old)

    def _notify(self) -> None:
        self._news = True
        self._changed.notify_all()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket.job in self._scheduler.jobs:
                self._finish(ticket.job, "cancelled")
                self._notify()

    def _finish(self, job: Job, ending: Ending | None, error: str | None = None) -> None:
        """Let a request go, and tell it why unless it knows."""
        row = next((row for row in self._scheduler.running if row.job is job), None)
        if row is not None:
            self._slots.release(row.slot)
        self._scheduler.end(job)
        if ending is not None:
            job.holder.give(Event(ending=ending, error=error))

    # What follows is called by the engine's thread alone.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # nobody waits for an engine that stopped
            with self._changed:
                self._closed = True
                for job in self._scheduler.jobs:
                    self._finish(job, "cancelled")

    def _turn(self) -> bool:
        """One round: who may start does, a prompt's part is read, each text gets a token."""
        with self._changed:
            while not (self._news or self._scheduler.running or self._closed):
                self._changed.wait(_PATIENCE if self._scheduler.waiting else None)
                self._news = self._news or bool(self._scheduler.waiting)
            if self._closed:
                return False
            self._news = False
            arrived, self._arrived = self._arrived, []
        try:
            self._receive(arrived)
            for start in self._admit():
                self._begin(start)
            self._read_prompts()
            self._write_tokens()
        except Exception as error:  # the device failed: nothing that was on it is certain
            self._recover(error)
        return True

    def _receive(self, arrived: Sequence[tuple[Adapter, Params | Exception]]) -> None:
        """Put adapters that were read into their slots."""
        for adapter, fitted in arrived:
            number = self._slots.number(adapter)
            if number is None:
                continue
            if not isinstance(fitted, Exception):
                self._shelf.write(number, fitted)
            with self._changed:
                if not isinstance(fitted, Exception):
                    self._slots.arrive(adapter)
                    continue
                self._slots.drop(adapter)
                ending = "refused" if isinstance(fitted, InputError) else "error"
                for job in [job for job in self._scheduler.waiting if job.adapter == adapter]:
                    self._finish(job, ending, str(fitted))

    def _admit(self) -> list[Start]:
        with self._changed:
            now = time.monotonic()
            for job in self._scheduler.jobs:
                if job.holder.deadline is not None and now >= job.holder.deadline:
                    self._finish(job, "deadline")
            starts = self._scheduler.admit(self._slots.take)
            for adapter in self._slots.missing:
                self._reader.submit(self._read_adapter, adapter)
            self._slots.missing.clear()
            return starts

    def _read_adapter(self, adapter: Adapter) -> None:
        try:
            found: Params | Exception = self._shelf.read(adapter)
        except Exception as error:
            found = error
        with self._changed:
            self._arrived.append((adapter, found))
            self._notify()

    def _begin(self, start: Start) -> None:
        ticket: Ticket = start.job.holder
        ticket.reused_tokens = start.reused
        self._counts["reused_tokens"] += start.reused
        if start.source is not None:
            self._batch.copy(start.source.number, start.row.number)
        if ticket.request.sampling.penalizes:
            self._batch.begin_penalties(start.row.number, start.job.prompt)

    def _read_prompts(self) -> None:
        """As many parts of prompts as are together no longer than the longest of parts."""
        left = self._batch.chunk
        while part := self._next_part():
            size = self._batch.prompt_tokens(len(part.tokens))
            if size > left:
                return
            self._step([part], 1, size)
            left -= size

    def _next_part(self) -> Part | None:
        with self._changed:
            return self._scheduler.prompt_part()

    def _write_tokens(self) -> None:
        with self._changed:
            parts = self._scheduler.text_parts()
            # Whoever reads a prompt has its next part soon; so has whoever comes meanwhile.
            count = 1 if self._scheduler.prompt_part() else self._at_once
        if parts:
            start = time.perf_counter()
            self._step(parts, self._batch.decode_rows(len(parts)), 1, count)
            taken = (time.perf_counter() - start) / count
            self._at_once = max(1, min(int(_SECONDS / taken), MOST_AT_ONCE))

    def _step(self, parts: Sequence[Part], batch: int, seq: int, count: int = 1) -> None:
        step, places = assembled(parts, self._scheduler.rows, batch, seq)
        chosen, finite = self._batch.step(self._shelf.slots, step, count)
        with self._changed:
            for part, place in zip(parts, places, strict=True):
                if np.all(finite[place]):
                    self._take(part, chosen, place)
                else:
                    self._spoil(part)

    def _take(self, part: Part, chosen: Chosen, place: int) -> None:
        """What a row read is in its cache, and what was chosen is its client's."""
        for at in range(chosen.token.shape[1]):
            if not self._scheduler.read(part):
                return
            self._counts["prompt_tokens"] += 0 if part.job.text else len(part.tokens)
            if part.last:
                self._push(part.job, chosen, place, at)
                part = dataclasses.replace(part, tokens=(part.job.text[-1],))

    def _push(self, job: Job, chosen: Chosen, place: int, at: int) -> None:
        job.text.append(int(chosen.token[place, at]))
        self._counts["new_tokens"] += 1
        event = job.holder.push(chosen, place, at)
        if event.ending is not None:
            self._finish(job, None)
        job.holder.give(event)

    def _spoil(self, part: Part) -> None:
        """End a request whose numbers overflowed, and leave nothing of them to others."""
        self._batch.wipe(part.row.number)
        self._scheduler.forget([part.row])
        if part.row.job is part.job:
            self._finish(part.job, "error", "the model's numbers are not finite")

    def _recover(self, error: Exception) -> None:
        with self._changed:
            for job in self._scheduler.jobs:
                self._finish(job, "error", f"{type(error).__name__}: {error}".splitlines()[0])
            self._scheduler.forget(self._scheduler.rows)
            self._slots.clear()
        self._batch.reset()
        self._shelf.reset()
