"""Several short examples in one row of a batch, without one seeing the other."""

import bisect
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from .._errors import InputError
from ._examples import Example

Batch = Mapping[str, Shaped[np.ndarray, "batch seq"]]
"""`input_ids`, `positions`, `segment_ids`, `rows` (int32) and `loss_mask` (bool)."""


def pack(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """Put examples into as few rows as best-fit decreasing needs.

    The longest goes first, each into the fullest row that still has space.  The outcome depends
    on the lengths alone.

    Args:
        lengths: Tokens of each example.
        seq_length: Tokens of a row.

    Returns:
        For each row the indices of its examples.

    Raises:
        InputError: if an example is longer than a row.

    Example:
        >>> pack([3, 5, 2, 4], 8)
        [[1, 0], [3, 2]]

    Source: Johnson 1974, "Fast algorithms for bin packing".
    """
    _check_fit(lengths, seq_length)
    rows: list[list[int]] = []
    # (space left, row), sorted: the first that is large enough is the fullest.
    open_rows: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(open_rows, (lengths[index], -1))
        if at == len(open_rows):
            space, row = seq_length, len(rows)
            rows.append([])
        else:
            space, row = open_rows.pop(at)
        rows[row].append(index)
        if space > lengths[index]:
            bisect.insort(open_rows, (space - lengths[index], row))
    return rows


def one_per_row(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """The plan without packing: each example in a row of its own, in order."""
    _check_fit(lengths, seq_length)
    return [[index] for index in range(len(lengths))]


def fill_batch(
    rows: Sequence[Sequence[Example]], *, batch_size: int, seq_length: int, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Write examples into the arrays of one batch.

    Args:
        rows: For each row its examples; rows that are missing stay padding.
        batch_size, seq_length: The shape of every array.
        pad_id: Token id of the padding.

    Returns:
        (batch_size, seq_length) arrays: `input_ids`; `positions`, from 0 in every example;
        `segment_ids`, from 1 in every row and 0 for padding; `loss_mask`, True where the token
        is a target; `rows`, the index of the source row and -1 for padding.

    Example:
        >>> example = Example(np.array([7, 8], np.int32), np.array([False, True]), row=0)
        >>> fill_batch([[example, example]], batch_size=1, seq_length=5)["segment_ids"].tolist()
        [[1, 1, 2, 2, 0]]
    """
    shape = (batch_size, seq_length)
    batch = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
        "rows": np.full(shape, -1, np.int32),
    }
    for line, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, 1):
            place = (line, slice(start, start + len(example)))
            batch["input_ids"][place] = example.input_ids
            batch["positions"][place] = np.arange(len(example), dtype=np.int32)
            batch["segment_ids"][place] = segment
            batch["loss_mask"][place] = example.loss_mask
            batch["loss_mask"][line, start] = False
            batch["rows"][place] = example.row
            start += len(example)
    return batch


def _check_fit(lengths: Sequence[int], seq_length: int) -> None:
    longest = max(lengths, default=0)
    if longest > seq_length:
        raise InputError(
            f"data: an example has {longest} tokens and a row {seq_length}; give max_length"
            f" {seq_length} when the examples are built, or a larger seq_length"
        )
