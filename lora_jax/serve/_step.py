"""From what the scheduler wants to what the device reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..models import Step, empty_step
from ._request import Ticket
from ._scheduler import Part, Row


def assembled(
    parts: Sequence[Part], rows: Sequence[Row], batch: int, seq: int
) -> tuple[Step, list[int]]:
    """A step of `batch` rows and `seq` tokens, and where in it each part is.

    Where all rows take part each is in its own place, and those that do nothing say how long they
    are: what they write lies behind that, where nobody looks.
    """
    step = empty_step(batch, seq)
    whole = batch == len(rows)
    if whole:
        step.rows[:] = np.arange(batch)
        step.lengths[:] = [len(row.tokens) for row in rows]
    places = [part.row.number if whole else at for at, part in enumerate(parts)]
    for place, part in zip(places, parts, strict=True):
        _fill(step, place, part)
    logprobs = any(part.job.holder.request.logprobs is not None for part in parts)
    return dataclasses.replace(step, logprobs=np.bool_(logprobs)), places


def _fill(step: Step, place: int, part: Part) -> None:
    ticket: Ticket = part.job.holder
    step.ids[place, : len(part.tokens)] = part.tokens
    step.rows[place] = part.row.number
    step.lengths[place] = part.start
    step.counts[place] = len(part.tokens)
    step.adapters[place] = part.row.slot
    step.ordinals[place] = len(part.job.text)
    step.chosen[place] = part.last
    for field in dataclasses.fields(step.params):
        getattr(step.params, field.name)[place] = getattr(ticket.params, field.name)[0]
