"""The engine: each answer as if alone, whatever else is in the batch, and nothing left behind."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from lora_jax import InputError
from lora_jax.models import SamplingParams, generate_text
from lora_jax.serve import Engine, QueueFullError
from tests.serve.answers import ask, assert_idle, prompt

CROWD = [
    ask(i, length, adapter=adapter, max_new_tokens=new)
    for i, (length, adapter, new) in enumerate(
        [(1, "a", 9), (40, None, 4), (17, "b", 12), (16, "a", 1), (60, "b", 5), (5, None, 20)]
    )
]


def warm(request, seed: int = 5):
    return dataclasses.replace(request, sampling=SamplingParams(temperature=1.5, seed=seed))


def test_every_answer_is_as_if_it_were_alone(engine, adapters):
    tickets = [engine.submit(request) for request in (*CROWD, ask(9, 33, adapter="c"))]
    for ticket in tickets:
        adapters.check(ticket)


def test_one_seed_says_one_thing(engine, adapters):
    request = warm(ask(3, adapter="b", max_new_tokens=12))
    alone = engine.submit(request)
    assert [event.token for event in alone] == adapters.alone(request)
    crowd = [engine.submit(warm(other, i)) for i, other in enumerate(CROWD)]
    again = engine.submit(request)
    assert [event.token for event in again] == adapters.alone(request)
    free = dataclasses.replace(request, sampling=SamplingParams(temperature=1.5))
    texts = [tuple(event.token for event in engine.submit(free)) for _ in range(2)]
    assert texts[0] != texts[1]
    assert all(list(ticket)[-1].ending for ticket in crowd)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(temperature=1.0, top_k=3, top_p=0.8, min_p=0.05, seed=1),
    ],
    ids=["penalties", "truncation"],
)
def test_tokens_are_chosen_as_generate_chooses(engine, adapters, sampling):
    request = ask(4, 20, sampling=sampling, max_new_tokens=16)
    others = [engine.submit(other) for other in CROWD[:3]]
    assert [event.token for event in engine.submit(request)] == adapters.alone(request)
    for other in others:
        list(other)


def test_text_stops_and_logprobs_are_those_of_generate_text(engine, pretrained):
    request = ask(6, 12, max_new_tokens=24, logprobs=3)
    base = (pretrained.module, pretrained.params, pretrained.tokenizer, [request.prompt])
    [whole] = generate_text(*base, max_new_tokens=24, logprobs=3)
    ticket = engine.submit(request)
    assert "".join(event.text for event in ticket) == whole.text == ticket.completion.text
    np.testing.assert_allclose(
        [p for one in ticket.completion.logprobs for p in (one.logprob, *dict(one.top).values())],
        [p for one in whole.logprobs for p in (one.logprob, *dict(one.top).values())],
        atol=1e-4,
    )
    stop, end = whole.text[len(whole.text) // 2 :][:2], whole.tokens[3]
    for options in (dict(stop=stop), dict(stop_ids=[end])):
        [expected] = generate_text(*base, max_new_tokens=24, **options)
        ticket = engine.submit(dataclasses.replace(request, logprobs=None, **options))
        *_, last = ticket
        assert ticket.completion.text == expected.text and last.ending == "stop"
        assert expected.tokens[: len(ticket.completion.tokens)] == ticket.completion.tokens


def test_a_prompt_may_be_text(engine, pretrained):
    ticket = engine.submit(dataclasses.replace(ask(0), prompt="one two"))
    tokenizer = pretrained.tokenizer
    assert ticket.job.prompt == tuple(tokenizer.with_bos(tokenizer.encode("one two")))
    assert list(ticket)[-1].ending is not None and list(ticket) == []


def test_a_beginning_is_read_once_for_each_adapter(engine, adapters):
    request = ask(11, 41, adapter="a")
    adapters.check(engine.submit(request))
    again = engine.submit(request)
    adapters.check(again)
    longer = engine.submit(dataclasses.replace(request, prompt=(*request.prompt[:30], 7, 8)))
    adapters.check(longer)
    other = engine.submit(dataclasses.replace(request, adapter="b"))
    adapters.check(other)
    assert [t.reused_tokens for t in (again, longer, other)] == [40, 30, 0]
    engine.load_adapter("a", adapters.folder / "a")
    anew = engine.submit(request)  # another version, whatever its files hold
    adapters.check(anew)
    assert anew.reused_tokens == 0


def test_a_beginning_is_copied_from_one_who_still_writes(engine, adapters):
    first, made = ask(12, 50, max_new_tokens=16), []
    second = dataclasses.replace(first, prompt=(*first.prompt[:45], 9))
    ticket = engine.submit(first, lambda event: made or made.append(engine.submit(second)))
    adapters.check(ticket)
    adapters.check(made[0])
    assert made[0].reused_tokens == 45


def test_nothing_is_compiled_or_kept_while_requests_come_and_go(engine, adapters):
    compiled = []

    def listen(name, *_, **__):
        compiled.extend([name] if "backend_compile" in name else [])

    def load():
        tickets = [engine.submit(warm(request)) for request in CROWD]
        tickets += [engine.submit(ask(20 + i, 3 + 9 * i, adapter="abc"[i % 3])) for i in range(9)]
        tickets[1].cancel()
        assert all(list(ticket)[-1].ending for ticket in tickets)

    load()
    programs, arrays = engine.compilations, len(jax.live_arrays())
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(2):
        load()
    assert (engine.compilations, len(jax.live_arrays()), compiled) == (programs, arrays, [])


def test_cancelling_leaves_nothing_behind(engine, adapters):
    rng = random.Random(0)
    tickets = []

    def maybe_cancel(_):
        if rng.random() < 0.2:
            rng.choice(tickets).cancel()

    for i in range(24):
        request = ask(i, rng.randint(1, 60), adapter=rng.choice([None, *"abc"]))
        tickets.append(engine.submit(request, maybe_cancel))
    endings = [list(ticket)[-1].ending for ticket in tickets]
    assert {"cancelled", "length"} <= set(endings) <= {"cancelled", "length", "stop"}
    tickets[0].cancel()  # which changes nothing
    assert_idle(engine)
    adapters.check(engine.submit(CROWD[4]))


def test_a_client_may_cancel_or_fail_while_it_is_told(engine, adapters):
    seen = []

    def cancel(event):
        seen.append(event.ending)
        tickets[0].cancel()

    def fail(_):
        raise RuntimeError("the connection is gone")

    crowd = [engine.submit(request) for request in CROWD]
    tickets = [engine.submit(ask(0, max_new_tokens=1), cancel)]
    assert [event.ending for event in tickets[0]] == ["length"] == seen
    gone = engine.submit(ask(1, max_new_tokens=30), fail)
    assert [event.ending for event in gone] == [None, "cancelled"]
    for ticket in crowd:
        adapters.check(ticket)


def test_an_answer_ends_at_its_deadline(engine):
    late = engine.submit(ask(0, timeout=0.0))
    assert [event.ending for event in late] == ["deadline"]


def test_no_more_wait_than_may(engine):
    tickets = []
    with pytest.raises(QueueFullError, match=r"3\d requests wait"):
        for i in range(64):
            tickets.append(engine.submit(ask(i, 60, max_new_tokens=30)))
    assert len(tickets) >= 32
    with pytest.raises(QueueFullError):  # all of them or none
        engine.submit_all([ask(1)] * 40, [None] * 40)
    for ticket in tickets:
        ticket.cancel()
    assert {list(ticket)[-1].ending for ticket in tickets} == {"cancelled"}


def test_a_device_that_fails_ends_what_it_has_and_goes_on(engine, adapters, monkeypatch):
    step = engine._batch.step

    def fail(*_):
        monkeypatch.setattr(engine._batch, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._batch, "step", fail)
    [event] = engine.submit(CROWD[0])
    assert event.ending == "error" and "out of memory" in (event.error or "")
    assert_idle(engine)
    adapters.check(engine.submit(CROWD[0]))


def test_a_closed_engine_takes_nothing_and_leaves_nobody_waiting(pretrained):
    sizes = dict(max_rows=1, max_length=32, prefill_chunk=16, adapter_slots=0)
    with Engine(pretrained, **sizes) as engine:
        with pytest.raises(InputError, match="has no room for adapters"):
            engine.load_adapter("a", pretrained.directory)
        tickets = [engine.submit(ask(i, max_new_tokens=20, stop_ids=())) for i in range(3)]
    assert list(tickets[2])[-1].ending == "cancelled"
    with pytest.raises(InputError, match="engine is closed"):
        engine.submit(ask(0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=()), "prompt: is empty"),
        (dict(prompt=(320,)), r"outside of 0\.\.319"),
        (
            dict(prompt=prompt(0, 90)),
            "has 90 tokens, which with 8 new ones exceeds the engine's 96",
        ),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(adapter="aa"), r"adapter: no 'aa' \(did you mean 'a'"),
        (dict(sampling=SamplingParams(top_k=[1, 2])), "top_k has 2 values for 1 prompts"),
        (dict(stop=""), "a stop string is empty"),
        (dict(logprobs=21), "logprobs must be from 0 to 20"),
        (dict(timeout=-1.0), "timeout must be at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_requests(engine, options, message):
    with pytest.raises(InputError, match=message):
        engine.submit(dataclasses.replace(ask(0), **options))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_rows=0), "max_rows must be at least 1"),
        (dict(max_length=129), "max_length is 129, but the model was made for 128"),
        (dict(adapter_slots=-1), "adapter_slots must be at least 0"),
        (dict(cache_dtype="int7"), "cache_dtype: unknown 'int7'"),
    ],
    ids=str,
)
def test_bad_engines(pretrained, options, message):
    with pytest.raises(InputError, match=message):
        Engine(pretrained, **{"max_rows": 1, "adapter_slots": 0, **options})
    with pytest.raises(InputError, match="has no tokenizer"):
        Engine(dataclasses.replace(pretrained, tokenizer=None))
