"""Adapters by name: where they are, and what a slot of the bank holds of them."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._tree import leaves_with_path
from .._typing import Params
from ..adapters import AdapterBank, load_adapter, write_slot
from ..models import Pretrained, apart


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One version of an adapter.  `stamp` tells whether its files are still the same."""

    name: str
    version: int
    directory: Path
    stamp: tuple[tuple[int, int], ...]


class Shelf:
    """The bank on the device, and adapters read from directories to fit it.

    Args:
        pretrained: The base that they are for.
        module: What reads the slots.
        config: What the bank has room for; None for no adapters at all.
        slots: How many of them at one time.
    """

    def __init__(
        self, pretrained: Pretrained, module: Any, config: LoraConfig | None, slots: int
    ) -> None:
        self._pretrained, self._module, self._versions = pretrained, module, itertools.count()
        self._bank: AdapterBank | None = None
        self.slots: Params = {}
        if config is not None:
            make = functools.partial(
                AdapterBank.empty, config=config, slots=slots, layouts=pretrained.layouts
            )
            # Of shapes alone, since the arrays are given away with each write.
            shapes = jax.eval_shape(lambda base: make(base).slots, pretrained.params)
            self._bank = AdapterBank(shapes, (None,) * slots)
            self.reset()
            self.write(0, self._bank.fitted({}))  # which compiles it

    def reset(self) -> None:
        """Empty all slots."""
        if self._bank is not None:
            shapes = jax.eval_shape(lambda x: apart(self._module, x), self._bank.slots)
            self.slots = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def load(self, name: str, directory: str | Path) -> tuple[Adapter, Params]:
        """A new version of an adapter, and what its slot would hold.

        Raises:
            InputError: if the files are not as they should be, or do not fit base and bank.
        """
        path = Path(directory)
        stamp = _stamp(path)
        fitted = self._fitted(path)
        return Adapter(name, next(self._versions), path, stamp), fitted

    def read(self, adapter: Adapter) -> Params:
        """What the slot of an adapter holds, which was loaded before and made way since.

        Raises:
            InputError: if its files are no longer what they were.
        """
        fitted = self._fitted(adapter.directory)
        if _stamp(adapter.directory) != adapter.stamp:
            raise InputError(
                f"{adapter.directory}: changed since it was loaded as {adapter.name!r}; load it"
                " again"
            )
        return fitted

    def write(self, number: int, fitted: Params) -> None:
        """Put an adapter into a slot, in one write to the device."""
        self.slots = write_slot(self.slots, apart(self._module, fitted), np.int32(number))

    def _fitted(self, directory: Path) -> dict[str, Any]:
        base = self._pretrained
        if self._bank is None:
            raise InputError(f"{directory}: this engine has no room for adapters (adapter_slots=0)")
        adapter, _ = load_adapter(directory, base.params, layouts=base.layouts)
        fitted = self._bank.fitted(adapter)
        for path, leaf in leaves_with_path(fitted):
            if not np.all(np.isfinite(leaf)):
                raise InputError(f"{directory}: {path} holds numbers that are not finite")
        return fitted


def _stamp(directory: Path) -> tuple[tuple[int, int], ...]:
    """Sizes and times of the files."""
    if not directory.is_dir():
        raise InputError(f"{directory}: is not a directory")
    stats = [file.stat() for file in sorted(directory.glob("adapter_*"))]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
