"""Batches: every epoch complete, the same again after a restart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax._errors import InputError
from lora_jax.data import Example, Examples, Report, batch_iterator, eval_batches

SHAPE = {"batch_size": 3, "seq_length": 16}


def make_examples(count: int, seed: int = 0) -> Examples:
    lengths = np.random.default_rng(seed).integers(2, 9, count)
    examples = tuple(
        Example(np.full(length, row, np.int32), np.arange(length) > 0, row)
        for row, length in enumerate(lengths)
    )
    report = Report(count, count, int(lengths.sum()), int((lengths - 1).sum()), 0, 0, {}, ())
    return Examples(examples, report, "alpaca")


def rows_of(batches) -> list[int]:
    """The examples in these batches, each once for every place it has."""
    found = []
    for batch in batches:
        starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        found += batch["rows"][starts].tolist()
    return found


def same(first, second) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_example(packing: bool) -> None:
    iterator = batch_iterator(make_examples(20), packing=packing, epochs=3, **SHAPE)
    epochs = [[next(iterator) for _ in range(iterator.batches_per_epoch)] for _ in range(3)]
    with pytest.raises(StopIteration):
        next(iterator)
    orders = [rows_of(epoch) for epoch in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert all(batch["input_ids"].shape == (3, 16) for epoch in epochs for batch in epoch)


def test_partners_change_between_epochs() -> None:
    iterator = batch_iterator(make_examples(40), **SHAPE)
    together = []
    for _ in range(2):
        batches = [next(iterator) for _ in range(iterator.batches_per_epoch)]
        lines = [line for batch in batches for line in batch["rows"]]
        together.append({frozenset(line.tolist()) - {-1} for line in lines})
    assert together[0] != together[1]


def test_without_shuffling_order_stays() -> None:
    iterator = batch_iterator(make_examples(20), packing=False, shuffle=False, epochs=1, **SHAPE)
    assert rows_of(iterator) == list(range(20))


def test_the_seed_decides() -> None:
    first, again, other = (
        next(batch_iterator(make_examples(20), seed=seed, **SHAPE)) for seed in (1, 1, 2)
    )
    assert same(first, again) and not same(first, other)


@settings(max_examples=15)
@given(st.integers(0, 25), st.integers(0, 25), st.booleans(), st.booleans())
def test_restoring_continues_with_the_same_batches(
    steps: int, more: int, packing: bool, shuffle: bool
) -> None:
    options = {"packing": packing, "shuffle": shuffle, "seed": 3, **SHAPE}
    iterator = batch_iterator(make_examples(20), **options)
    for _ in range(steps):
        next(iterator)
    state = json.dumps(iterator.get_state())
    assert len(state) < 200
    expected = [next(iterator) for _ in range(4)]
    for _ in range(more):
        next(iterator)
    # Restored in the same iterator, and in one of a new process.
    for place in (iterator, batch_iterator(make_examples(20), **options)):
        place.set_state(json.loads(state))
        assert place.epoch == steps / place.batches_per_epoch
        assert all(same(next(place), batch) for batch in expected)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 2}, {"seq_length": 17}, {"shuffle": False}]
)
def test_a_state_of_something_else_is_refused(change: dict) -> None:
    state = batch_iterator(make_examples(20), **SHAPE).get_state()
    other = batch_iterator(make_examples(20), **{**SHAPE, **change})
    with pytest.raises(InputError, match="other rows, tokens or batch options"):
        other.set_state(state)
    with pytest.raises(InputError, match="other rows"):
        batch_iterator(make_examples(21), **SHAPE).set_state(state)


def test_remainder() -> None:
    examples = make_examples(7)
    options = {"packing": False, "epochs": 1, **SHAPE}
    kept = list(batch_iterator(examples, **options))
    assert len(kept) == 3 and sorted(rows_of(kept)) == list(range(7))
    assert (kept[-1]["segment_ids"] > 0).any(axis=1).sum() == 1
    assert len(list(batch_iterator(examples, drop_remainder=True, **options))) == 2
    with pytest.raises(InputError, match="2 rows do not fill one batch of 3"):
        batch_iterator(make_examples(2), drop_remainder=True, **options)


@pytest.mark.parametrize("packing", [True, False])
def test_eval_batches(packing: bool) -> None:
    examples = make_examples(10)
    batches, again = (list(eval_batches(examples, packing=packing, **SHAPE)) for _ in range(2))
    assert sorted(rows_of(batches)) == list(range(10))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert all(batch["input_ids"].shape == (3, 16) for batch in batches)
    trained = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert trained == examples.report.trained_tokens


def test_bad_options() -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        batch_iterator(make_examples(3), batch_size=0, seq_length=16)
    with pytest.raises(InputError, match="seed must not be negative"):
        batch_iterator(make_examples(3), seed=-1, **SHAPE)
    with pytest.raises(InputError, match="give max_length 4"):
        batch_iterator(make_examples(9), batch_size=1, seq_length=4)


def test_processes_fill_their_own_rows():
    """What two of them fill is together what one fills."""
    examples = make_examples(20)
    whole, first, second = (
        batch_iterator(examples, own_rows=own, **SHAPE) for own in (None, {0, 2}, {1})
    )
    for _ in range(7):
        batch, *parts = next(whole), next(first), next(second)
        for name, filled in batch.items():
            assert np.array_equal(parts[0][name][[0, 2]], filled[[0, 2]])
            assert np.array_equal(parts[1][name][1], filled[1])
        assert not parts[0]["segment_ids"][1].any() and (parts[1]["rows"][[0, 2]] == -1).all()
    assert first.get_state() == whole.get_state()
    (own,) = eval_batches(make_examples(3), own_rows={1}, **SHAPE)
    assert not own["segment_ids"][[0, 2]].any() and own["segment_ids"][1].any()
