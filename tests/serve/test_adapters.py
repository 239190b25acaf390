"""Adapters that come and go while requests are in flight."""

import shutil

import pytest

from lora_jax import InputError
from tests.serve.answers import ask


def in_flight(engine, request, act):
    """The ticket of a request at whose first token something happens."""
    done = []

    def once(event):
        if not done:
            done.append(event)
            act()

    return engine.submit(request, once)


def test_more_are_known_than_there_are_slots(engine, adapters):
    for _ in range(2):
        for name in "abc":
            adapters.check(engine.submit(ask(1, adapter=name)))
    assert list(engine.adapters) == ["a", "b", "c"]
    tickets = [engine.submit(ask(i, adapter="abc"[i % 3])) for i in range(9)]
    for ticket in tickets:
        adapters.check(ticket)


def test_an_adapter_is_unloaded_under_a_request(engine, adapters):
    request = ask(2, adapter="a", max_new_tokens=16)
    ticket = in_flight(engine, request, lambda: engine.unload_adapter("a"))
    waiting = engine.submit(ask(3, adapter="a"))
    adapters.check(ticket)
    adapters.check(waiting)
    for use in (lambda: engine.submit(request), lambda: engine.unload_adapter("a")):
        with pytest.raises(InputError, match=r"adapter: no 'a'.*; loaded: b, c"):
            use()


def test_a_name_gets_another_adapter_under_a_request(engine, adapters):
    request, later = ask(2, adapter="a", max_new_tokens=16), []

    def replace():
        engine.load_adapter("a", adapters.folder / "b")
        later.append(engine.submit(request))

    ticket = in_flight(engine, request, replace)
    adapters.check(ticket)
    list(later[0])
    expected = adapters.alone(ask(2, adapter="b", max_new_tokens=16))
    assert list(later[0].completion.tokens) == expected != adapters.alone(request)


def test_what_cannot_be_read_is_never_visible(engine, adapters, tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        engine.load_adapter("new", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="adapter_config.json"):
        engine.load_adapter("new", tmp_path / "empty")
    with pytest.raises(InputError, match="has rank 5, and there is room for 4"):
        engine.load_adapter("a", adapters.make("wide", 7, rank=5))
    with pytest.raises(InputError, match="holds numbers that are not finite"):
        engine.load_adapter("a", adapters.make("nan", 7, factor=float("nan")))
    assert list(engine.adapters) == ["a", "b", "c"]
    adapters.check(engine.submit(ask(4, adapter="a")))


def test_files_that_changed_are_not_read_in_silence(engine, adapters, tmp_path):
    directory = shutil.copytree(adapters.folder / "a", tmp_path / "own")
    engine.load_adapter("own", directory)
    for name in "abc":  # all of them in turn: the first has made way
        list(engine.submit(ask(5, adapter=name)))
    shutil.copytree(adapters.folder / "b", directory, dirs_exist_ok=True)
    *_, last = engine.submit(ask(5, adapter="own"))
    assert last.ending == "refused" and "changed since it was loaded as 'own'" in (last.error or "")
    shutil.rmtree(directory)
    *_, last = engine.submit(ask(5, adapter="own"))
    assert last.ending == "refused"
    engine.unload_adapter("own")


def test_numbers_that_overflow_reach_nobody_else(engine, adapters):
    engine.load_adapter("huge", adapters.make("huge", 8, factor=1e30))
    others = [engine.submit(ask(i, 20, max_new_tokens=16)) for i in range(2)]
    spoiled = [engine.submit(ask(i, 40, adapter="huge")) for i in range(4)]
    for ticket in spoiled:
        *_, last = ticket
        assert (last.ending, last.error) == ("error", "the model's numbers are not finite")
    for ticket in (*others, *(engine.submit(ask(i, 9)) for i in range(6))):
        adapters.check(ticket)
    engine.unload_adapter("huge")
