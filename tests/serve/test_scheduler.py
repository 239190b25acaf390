"""Scheduling without a model: rows and slots in any order of arrivals, cancellations and reads."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.serve._scheduler import Job, QueueFullError, Scheduler, Wait, common_prefix
from lora_jax.serve._slots import Slots

ROWS, SLOTS, CHUNK, WAITING = 3, 2, 3, 6

submits = st.tuples(
    st.just("submit"),
    st.lists(st.integers(0, 1), min_size=1, max_size=24),
    st.sampled_from([None, "a", "b", "c"]),
    st.integers(1, 4),
)
others = st.tuples(st.sampled_from(["step", "cancel", "arrive", "fail"]), st.integers(0, 9))


@dataclasses.dataclass
class World:
    """A device that does what it is told, so that what is believed of it can be checked."""

    scheduler: Scheduler = dataclasses.field(
        default_factory=lambda: Scheduler(ROWS, WAITING, CHUNK)
    )
    slots: Slots = dataclasses.field(default_factory=lambda: Slots(SLOTS))
    reading: list = dataclasses.field(default_factory=list)
    cache: list = dataclasses.field(default_factory=lambda: [[] for _ in range(ROWS)])
    submitted: list = dataclasses.field(default_factory=list)
    started: list = dataclasses.field(default_factory=list)

    def submit(self, prompt, adapter, limit):
        job = Job(tuple(prompt), adapter, holder=limit)
        try:
            self.scheduler.submit(job)
            self.submitted.append(job)
        except QueueFullError:
            free = ROWS - len(self.scheduler.running)
            assert len(self.scheduler.waiting) == WAITING + free

    def cancel(self, at):
        if jobs := self.scheduler.jobs:
            self.end(jobs[at % len(jobs)])

    def arrive(self, at):
        if self.reading:
            self.slots.arrive(self.reading.pop(at % len(self.reading)))

    def fail(self, at):
        if self.reading:
            adapter = self.reading.pop(at % len(self.reading))
            self.slots.drop(adapter)
            for job in [job for job in self.scheduler.waiting if job.adapter == adapter]:
                self.end(job)

    def end(self, job):
        row = next((row for row in self.scheduler.running if row.job is job), None)
        if row is not None:
            self.slots.release(row.slot)
        assert self.scheduler.end(job) is row

    def step(self, _=0):
        for start in self.scheduler.admit(self.slots.take):
            self.started.append(start.job)
            if start.source is not None:
                assert start.reused >= 16
                self.cache[start.row.number] = list(self.cache[start.source.number])
        self.reading += self.slots.missing
        self.slots.missing.clear()
        part = self.scheduler.prompt_part()
        for own in [] if part is None else [part]:
            self.read(own)
        for own in self.scheduler.text_parts():
            self.read(own)

    def read(self, part):
        assert part.start == len(part.row.tokens) and 0 < len(part.tokens) <= CHUNK
        known = [*part.job.prompt, *part.job.text]
        assert known[part.start :][: len(part.tokens)] == list(part.tokens)
        assert part.last == (part.start + len(part.tokens) == len(known))
        written = [(token, part.row.adapter) for token in part.tokens]
        # What was behind stays there, as garbage that nobody may believe in.
        own = self.cache[part.row.number]
        own[part.start : part.start + len(written)] = written
        assert self.scheduler.read(part)
        if part.last:
            part.job.text.append(len(part.job.text) % 2)
            if len(part.job.text) == part.job.holder:
                self.end(part.job)

    def check(self):
        for row in self.scheduler.rows:
            held = self.cache[row.number][: len(row.tokens)]
            assert held == [(token, row.adapter) for token in row.tokens]
            if row.job is not None:
                assert row.adapter == row.job.adapter
                assert row.adapter is None or self.slots.slots[row.slot].adapter == row.adapter
                assert row.adapter is None or self.slots.slots[row.slot].ready
        for slot in self.slots.slots:
            users = [row for row in self.scheduler.running if row.slot == slot.number]
            assert slot.users == len(users)
        jobs = self.scheduler.jobs
        assert len(set(map(id, jobs))) == len(jobs)


@settings(max_examples=150)
@given(st.lists(st.one_of(submits, others), max_size=60))
def test_rows_hold_what_is_believed_and_everybody_ends(ops):
    world = World()
    for name, *arguments in ops:
        getattr(world, name)(*arguments)
        world.check()
    # Whoever came before among those of one adapter begins before.
    for adapter in (None, "a", "b", "c"):
        order = [job for job in world.submitted if job.adapter == adapter and job in world.started]
        assert order == [job for job in world.started if job.adapter == adapter]
    longest = sum(len(job.prompt) + job.holder for job in world.scheduler.jobs)
    for _ in range(longest + 2 * len(world.scheduler.jobs) + 2):
        world.step()
        world.arrive(0)
        world.check()
    assert not world.scheduler.jobs
    assert not any(slot.users for slot in world.slots.slots)


def test_nobody_passes_one_who_waits_for_a_slot():
    scheduler, slots = Scheduler(3, 8, 4), Slots(1)
    first, second, third = Job((1,), "a"), Job((2,), "b"), Job((3,), "a")
    for job in (first, second, third):
        scheduler.submit(job)
    assert not scheduler.admit(slots.take) and slots.missing == ["a"]
    slots.arrive("a")
    assert [start.job for start in scheduler.admit(slots.take)] == [first]
    # The slot is in use: were the third let in, those of `a` could keep the second out for ever.
    assert slots.take("b") is Wait.NO_SLOT and not scheduler.admit(slots.take)
    slots.release(0)
    scheduler.end(first)
    assert not scheduler.admit(slots.take) and slots.missing == ["a", "b"]


def test_others_pass_one_whose_adapter_is_read():
    scheduler, slots = Scheduler(1, 8, 4), Slots(2)
    reading, plain = Job((1,), "a"), Job((2,))
    scheduler.submit(reading)
    scheduler.submit(plain)
    assert [start.job for start in scheduler.admit(slots.take)] == [plain]
    assert scheduler.waiting == [reading]


def test_the_least_recently_used_adapter_makes_way():
    slots = Slots(2)
    for name in "ab":
        slots.take(name)
        slots.arrive(name)
    slots.release(slots.take("a"))
    assert slots.take("c") is Wait.READING
    assert (slots.number("a"), slots.number("b"), slots.number("c")) == (0, None, 1)
    assert slots.reserve_empty("d") is False


@pytest.mark.parametrize("free", [True, False], ids=["in place", "by a copy"])
def test_a_beginning_is_found_again(free):
    scheduler = Scheduler(2, 8, 64)
    prompt = tuple(range(40))
    one, two = Job(prompt), Job((*prompt[:30], 7))
    scheduler.submit(one)
    scheduler.admit(lambda _: -1)
    scheduler.read(scheduler.prompt_part())
    if free:
        scheduler.end(one)
    scheduler.submit(two)
    [start] = scheduler.admit(lambda _: -1)
    assert start.reused == 30 and start.row.tokens == list(prompt[:30])
    assert (start.row.number, start.source) == ((0, None) if free else (1, scheduler.rows[0]))
    scheduler.submit(Job(prompt, adapter="a"))
    scheduler.end(two)
    assert scheduler.admit(lambda _: 0)[0].reused == 0


def test_common_prefix():
    assert [common_prefix(x, [1, 2]) for x in ([], [1], [1, 2, 3], [2])] == [0, 1, 2, 0]
