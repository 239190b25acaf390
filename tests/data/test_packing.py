"""Packing: nothing lost, nothing twice, nothing seen across borders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax._errors import InputError
from lora_jax.data import Example, fill_batch, pack

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def make_example(length: int, row: int) -> Example:
    ids = np.arange(length, dtype=np.int32) + 100 * (row + 1)
    mask = np.arange(length) % 3 != 0
    return Example(ids, mask, row)


@settings(max_examples=20)
@given(LENGTHS)
def test_every_example_has_one_place(lengths: list[int]) -> None:
    plan = pack(lengths, 12)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 for row in plan)
    # Best fit never opens a row while two half-empty ones stand open.
    assert sum(2 * sum(lengths[i] for i in row) <= 12 for row in plan) <= 1


@settings(max_examples=20)
@given(LENGTHS)
def test_batch_holds_every_token_once(lengths: list[int]) -> None:
    examples = [make_example(length, row) for row, length in enumerate(lengths)]
    plan = pack(lengths, 12)
    rows = [[examples[i] for i in row] for row in plan]
    batch = fill_batch(rows, batch_size=len(plan) + 1, seq_length=12, pad_id=7)
    real = batch["segment_ids"] > 0
    assert sorted(batch["input_ids"][real]) == sorted(t for e in examples for t in e.input_ids)
    assert (batch["input_ids"][~real] == 7).all()
    assert (batch["rows"][~real] == -1).all() and not batch["loss_mask"][~real].any()
    for line, row in enumerate(rows):
        for segment, example in enumerate(row, 1):
            at = batch["segment_ids"][line] == segment
            assert batch["input_ids"][line, at].tolist() == example.input_ids.tolist()
            assert batch["positions"][line, at].tolist() == list(range(len(example)))
            assert batch["loss_mask"][line, at].tolist() == example.loss_mask.tolist()
            assert set(batch["rows"][line, at]) == {example.row}


def test_types_and_first_token() -> None:
    whole = Example(np.arange(3, dtype=np.int32), np.ones(3, bool), 5)
    batch = fill_batch([[whole, whole]], batch_size=1, seq_length=8)
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "input_ids": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "loss_mask": "bool",
        "rows": "int32",
    }
    assert batch["loss_mask"][0].tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]


def test_too_long_an_example() -> None:
    with pytest.raises(InputError, match="13 tokens and a row 12; give max_length 12"):
        pack([3, 13], 12)
