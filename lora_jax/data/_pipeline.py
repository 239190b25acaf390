"""Batches without end, the same ones again after a restart."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import InputError
from ._examples import Example, Examples, digest_of
from ._packing import fill_batch, one_per_row, pack


class _Batches:
    """Every batch of every epoch, each computed from its number alone.

    The rows are packed once, from the lengths.  An epoch's order then says which of the
    examples of equal length takes which place, and which row goes into which batch: so every
    epoch has the same number of batches and restoring needs one number, where grain's own
    packing would have to read up to the place again.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        epochs: int | None,
        drop_remainder: bool,
        pad_id: int,
        own_rows: Collection[int] | None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"data: batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise InputError(f"data: seed must not be negative, got {seed}")
        lengths = [len(example) for example in examples]
        self.examples = examples
        self.plan = (pack if packing else one_per_row)(lengths, seq_length)
        self.batch_size, self.seq_length, self.pad_id = batch_size, seq_length, pad_id
        self.own_rows = range(batch_size) if own_rows is None else own_rows
        self.seed = seed if shuffle else None
        whole, rest = divmod(len(self.plan), batch_size)
        self.per_epoch = whole + (rest > 0 and not drop_remainder)
        if self.per_epoch == 0:
            raise InputError(
                f"data: {len(self.plan)} rows do not fill one batch of {batch_size}; give more"
                " rows, a smaller batch_size, or keep the remainder"
            )
        self.length = sys.maxsize if epochs is None else epochs * self.per_epoch
        self._same_length = _groups(lengths)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, number = divmod(int(index), self.per_epoch)
        rows = self._rows(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        own = (row if place in self.own_rows else [] for place, row in enumerate(rows))
        return fill_batch(
            [[self.examples[i] for i in row] for row in own],
            batch_size=self.batch_size,
            seq_length=self.seq_length,
            pad_id=self.pad_id,
        )

    def _rows(self, epoch: int) -> list[list[int]]:
        known, rows = self._epoch
        if known != epoch:
            rows = self.plan if self.seed is None else self._shuffled(self.seed, epoch)
            self._epoch = (epoch, rows)
        return rows

    def _shuffled(self, seed: int, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((seed, epoch))
        takes = np.empty(len(self.examples), np.int64)
        for group in self._same_length:
            takes[group] = generator.permutation(group)
        order = generator.permutation(len(self.plan))
        # Within a row too, so that no example always stands first.
        return [generator.permutation(takes[self.plan[row]]).tolist() for row in order]


class BatchIterator:
    """Batches of training data whose place can be saved and restored.

    Iterating gives dicts of numpy arrays (see `fill_batch`).  Keep the result of `get_state`
    beside a checkpoint; `set_state` goes on with exactly the batch that would have come next.
    """

    def __init__(self, batches: _Batches) -> None:
        import grain

        self._batches = batches
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._fingerprint = _fingerprint(batches)

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every example has been seen once."""
        return self._batches.per_epoch

    @property
    def epoch(self) -> float:
        """Epochs behind the next batch, fractions included."""
        return self._iterator.get_state()["next_index"] / self.batches_per_epoch

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place in the data, as a small JSON object."""
        return {**self._iterator.get_state(), "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `get_state` gave.

        Raises:
            InputError: if the state belongs to other data or other options.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise InputError(
                "data: the checkpoint was made with other rows, tokens or batch options; resume"
                " with the same, or start anew"
            )
        self._iterator.set_state({k: v for k, v in state.items() if k != "fingerprint"})


def batch_iterator(
    examples: Examples,
    *,
    batch_size: int,
    seq_length: int,
    packing: bool = True,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = None,
    drop_remainder: bool = False,
    pad_id: int = 0,
    own_rows: Collection[int] | None = None,
) -> BatchIterator:
    """Training batches, shuffled anew in every epoch.

    Args:
        examples: What `build_examples` gave.
        batch_size, seq_length: The shape of every array.
        packing: Put several examples into one row.
        shuffle: Otherwise every epoch has the same order.
        seed: Decides the order of every epoch.
        epochs: When to stop; never, without it.
        drop_remainder: Leave out the last batch of an epoch if it is not full, rather than
            fill it with padding.
        pad_id: Token id of the padding.
        own_rows: Which rows of a batch to fill, where others are another process's; all by default.

    Raises:
        InputError: if an example is longer than `seq_length`, or there is no whole batch.

    Example:
        >>> from lora_jax.data import Example, Examples, Report
        >>> one = Example(np.array([7, 8], np.int32), np.array([False, True]), row=0)
        >>> report = Report(1, 1, 2, 1, 0, 0, {}, ())
        >>> examples = Examples((one,), report, "plain")
        >>> batches = batch_iterator(examples, batch_size=1, seq_length=3)
        >>> next(batches)["input_ids"].tolist(), batches.get_state()["next_index"]
        ([[7, 8, 0]], 1)
    """
    return BatchIterator(
        _Batches(
            examples.examples,
            batch_size=batch_size,
            seq_length=seq_length,
            packing=packing,
            shuffle=shuffle,
            seed=seed,
            epochs=epochs,
            drop_remainder=drop_remainder,
            pad_id=pad_id,
            own_rows=own_rows,
        )
    )


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    seq_length: int,
    packing: bool = True,
    pad_id: int = 0,
    own_rows: Collection[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, always in the same order; the last batch is filled with padding.

    Args:
        examples: What `build_examples` gave.
        batch_size, seq_length: The shape of every array.
        packing: Put several examples into one row.
        pad_id: Token id of the padding.
        own_rows: Which rows of a batch to fill; all by default.

    Returns:
        An iterator over batches (see `fill_batch`).

    Raises:
        InputError: if an example is longer than `seq_length`.

    Example:
        >>> from lora_jax.data import Example, Examples, Report
        >>> one = Example(np.array([7, 8], np.int32), np.array([False, True]), row=0)
        >>> report = Report(1, 1, 2, 1, 0, 0, {}, ())
        >>> examples = Examples((one,), report, "plain")
        >>> [batch["rows"].tolist() for batch in eval_batches(examples, batch_size=1, seq_length=3)]
        [[[0, 0, -1]]]
    """
    batches = _Batches(
        examples.examples,
        batch_size=batch_size,
        seq_length=seq_length,
        packing=packing,
        shuffle=False,
        seed=0,
        epochs=1,
        drop_remainder=False,
        pad_id=pad_id,
        own_rows=own_rows,
    )
    return (batches[number] for number in range(len(batches)))


def _groups(lengths: Sequence[int]) -> list[np.ndarray]:
    """Indices of the examples of each length."""
    order = np.argsort(lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(np.asarray(lengths)[order])) + 1
    return np.split(order, cuts)


def _fingerprint(batches: _Batches) -> str:
    """Tells apart everything that decides which batches come."""
    options = (batches.batch_size, batches.seq_length, batches.seed, batches.per_epoch)
    told = json.dumps([*options, batches.pad_id, batches.plan])
    return digest_of(batches.examples, told)
