"""Which adapter is in which slot of the bank: a data structure without a model."""

import dataclasses
from collections.abc import Hashable
from typing import Any

from ..lora import PLAIN
from ._scheduler import Wait


@dataclasses.dataclass(eq=False)
class Slot:
    """A slot, the adapter that is in it or read for it, and how many requests use it."""

    number: int
    adapter: Hashable | None = None
    ready: bool = False
    users: int = 0
    used: int = 0

    @property
    def held(self) -> bool:
        """Whether the slot cannot be given to another adapter."""
        return self.users > 0 or self.adapter is not None and not self.ready


class Slots:
    """Slots for more adapters than there is room for: the least recently used one makes way.

    Example:
        >>> slots = Slots(1)
        >>> slots.take("legal"), slots.missing
        (<Wait.READING: 'reading'>, ['legal'])
        >>> slots.arrive("legal"), slots.take("legal"), slots.take("poems")
        (0, 0, <Wait.NO_SLOT: 'no slot'>)
    """

    def __init__(self, count: int) -> None:
        self.slots = tuple(Slot(number) for number in range(count))
        self.missing: list[Any] = []
        self._clock = 0

    def take(self, adapter: Hashable) -> int | Wait:
        """An adapter's slot, in use by one more; otherwise it is `missing` and has a slot to come.

        None stands for the plain base, which needs no slot.
        """
        if adapter is None:
            return PLAIN
        slot = self._slot(adapter)
        if slot is None and (slot := self._make_way(adapter)) is None:
            return Wait.NO_SLOT
        if not slot.ready:
            return Wait.READING
        slot.users += 1
        self._touch(slot)
        return slot.number

    def arrive(self, adapter: Hashable) -> int | None:
        """Note that an adapter is in its slot, if it still has one."""
        slot = self._slot(adapter)
        if slot is None:
            return None
        slot.ready = True
        return slot.number

    def number(self, adapter: Hashable) -> int | None:
        """The slot that an adapter has or will have."""
        slot = self._slot(adapter)
        return None if slot is None else slot.number

    @property
    def filled(self) -> int:
        """How many slots hold an adapter."""
        return sum(slot.ready for slot in self.slots)

    def release(self, number: int) -> None:
        """One request fewer uses a slot."""
        if number != PLAIN:
            self.slots[number].users -= 1

    def drop(self, adapter: Hashable) -> None:
        """Free an adapter's slot, unless requests use it: then it goes when others need it."""
        slot = self._slot(adapter)
        if slot is not None and slot.users == 0:
            slot.adapter, slot.ready = None, False

    def clear(self) -> None:
        """Note that no slot holds anything."""
        for slot in self.slots:
            slot.adapter, slot.ready = None, False

    def reserve_empty(self, adapter: Hashable) -> bool:
        """Keep a slot for an adapter if one is empty; it has to `arrive`."""
        slot = next((slot for slot in self.slots if slot.adapter is None), None)
        if slot is not None:
            slot.adapter = adapter
            self._touch(slot)
        return slot is not None

    def _make_way(self, adapter: Hashable) -> Slot | None:
        free = [slot for slot in self.slots if not slot.held]
        if not free:
            return None
        slot = min(free, key=lambda slot: (slot.adapter is not None, slot.used))
        slot.adapter, slot.ready = adapter, False
        self.missing.append(adapter)
        return slot

    def _slot(self, adapter: Hashable) -> Slot | None:
        return next((slot for slot in self.slots if slot.adapter == adapter), None)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock
