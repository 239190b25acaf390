"""A bank of adapters in slots of one shape: any of them is swapped without compiling anew."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .._config import LoraConfig
from .._errors import InputError, nearest, some_of
from .._tree import combine, leaves_with_path, map_with_path, tree_from_paths
from .._typing import Array, Params
from ..lora import PLAIN, Layouts, choose_rows, init_adapter, pad_rank, rank_axis, whole_parameters

_OWN_AXES = {"lora_A": 2, "lora_B": 2, "lora_scaling": 0, "lora_magnitude": 1, "lora_B_bias": 1}
"""How many axes a leaf has for one layer of one adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Adapters of one base in numbered slots, padded to one rank.

    Every method returns another bank; shapes stay the same, so a function compiled for
    `combine(base_params, bank.overlay([...]))` serves whatever the slots hold.

    Args:
        slots: As an adapter's tree, each leaf with an axis of slots behind those of layers:
            `lora_A (layers, slots, d_in, rank)`.  Trainable; an empty slot is all zeros.
        names: What each slot holds, or None.

    Example:
        >>> from lora_jax import combine, lora_linen
        >>> import flax.linen as nn
        >>> model, x = nn.Dense(3, name="head"), jnp.ones((2, 4))
        >>> base = model.init(jax.random.key(0), x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> bank = AdapterBank.empty(base, config, slots=2)
        >>> bank = bank.swap("legal", init_adapter(jax.random.key(1), base, config))
        >>> params = combine(base, bank.overlay(["legal", None]))
        >>> y = lora_linen(model).apply({"params": params}, x)
        >>> bool(jnp.all(y[1] == model.apply({"params": base}, x)[1]))
        True

    Source: the layout of Chen et al. 2023, "Punica", and Sheng et al. 2023, "S-LoRA".
    """

    slots: dict[str, Any]
    names: tuple[str | None, ...]

    @classmethod
    def empty(
        cls,
        base_params: Params,
        config: LoraConfig,
        *,
        slots: int = 8,
        layouts: Layouts | None = None,
    ) -> "AdapterBank":
        """A bank with room for adapters like the config's, of its rank or less.

        Args:
            base_params: The base's parameters, or their shapes.
            config: Which modules can be adapted, the largest rank, the dtype, and with `use_dora`
                or `lora_bias` room for those; patterns of ranks and alphas are left aside.
            slots: How many adapters there is room for.
            layouts: Axes of kernels that are not plain matrices, and of stacked layers.

        Raises:
            InputError: for what no row can have of its own: whole modules, biases of the base,
                token rows, parameters named by `target_parameters`.
        """
        if slots < 1:
            raise InputError(f"AdapterBank: slots must be at least 1, got {slots}")
        for name in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            if getattr(config, name):
                raise InputError(
                    f"AdapterBank: {name} gives what rows of one batch would have to share; leave"
                    " it out, or merge such an adapter into a base of its own"
                )
        if config.bias != "none":
            raise InputError(
                f"AdapterBank: bias={config.bias!r} gives rows of one batch biases that they share;"
                " use bias='none', or lora_bias"
            )
        usual = config.with_usual_start()
        plain = dataclasses.replace(usual, rank_pattern={}, alpha_pattern={})
        make = functools.partial(init_adapter, config=plain, layouts=layouts)
        shapes = jax.eval_shape(make, jax.random.key(0), base_params)

        def leaf(path: str, x: Any) -> Array:
            axis = _slot_axis(path, x)
            if axis is None:
                return jnp.ones(x.shape, x.dtype)  # a mark, whose presence alone counts
            return jnp.zeros((*x.shape[:axis], slots, *x.shape[axis:]), x.dtype)

        return cls(dict(map_with_path(leaf, shapes)), (None,) * slots)

    def swap(self, name: str, adapter: Params, *, slot: int | None = None) -> "AdapterBank":
        """The bank with an adapter in a slot, whatever was there before.

        Args:
            name: To choose it by; one that is there already keeps its slot.
            adapter: As from `init_adapter` or `load_adapter`; of the bank's rank or less, and of
                its modules or some of them.
            slot: Where to put it; the first free one by default.

        Raises:
            InputError: if it does not fit, naming the first three reasons, or no slot is free.
        """
        number, fitted = self._slot_for(name, slot), self.fitted(adapter)
        moves = name in self.names and self.slot(name) != number
        bank = self.drop(name) if moves else self
        names = (*bank.names[:number], name, *bank.names[number + 1 :])
        return AdapterBank(_written(bank.slots, fitted, number), names)

    def fitted(self, adapter: Params) -> dict[str, Any]:
        """An adapter as one slot holds it: of the bank's rank and modules, in the bank's dtype.

        Raises:
            InputError: if it does not fit, naming the first three reasons.
        """
        return _fitted(self.slots, adapter)

    def drop(self, name: str) -> "AdapterBank":
        """The bank with a slot emptied.

        Raises:
            InputError: if there is no such adapter.
        """
        number = self.slot(name)
        empty = jax.tree.map(lambda x: np.zeros((), x.dtype), self.slots)
        names = (*self.names[:number], None, *self.names[number + 1 :])
        return AdapterBank(_written(self.slots, empty, number), names)

    def slot(self, name: str) -> int:
        """The number of the slot that holds an adapter.

        Raises:
            InputError: if none does.
        """
        if name not in self.names:
            held = [own for own in self.names if own is not None]
            there = f"it holds {', '.join(held)}" if held else "it is empty"
            raise InputError(f"AdapterBank: no adapter {name!r}{nearest(str(name), held)}; {there}")
        return self.names.index(name)

    def rows(self, names: Sequence[str | None]) -> Int[Array, " batch"]:
        """The slot of each row by the adapter's name; None is the plain base.

        Example:
            >>> AdapterBank({}, ("legal", "poems")).rows(["poems", None]).tolist()
            [1, -1]
        """
        numbers = [PLAIN if name is None else self.slot(name) for name in names]
        return jnp.asarray(numbers, jnp.int32)

    def overlay(self, names: Sequence[str | None] | Int[Array, " batch"]) -> dict[str, Any]:
        """What to lay over the base so that each row goes through its adapter.

        Args:
            names: An adapter for each row, by name (None is the plain base) or by slot (-1 is).
        """
        rows = self.rows(names) if isinstance(names, list | tuple) else names
        return combine(self.slots, choose_rows(self.slots, jnp.asarray(rows)))

    def take(self, name: str, like: Params) -> dict[str, Any]:
        """An adapter out of its slot, as it went in or as it was trained there since.

        Args:
            name: Which one.
            like: The adapter that was swapped in, or its shapes.
        """
        number, slots = self.slot(name), dict(leaves_with_path(self.slots))

        def leaf(path: str, x: Any) -> Any:
            axis = _slot_axis(path, x)
            if axis is None:
                return x
            own = jnp.take(slots[path], number, axis=axis)
            return own[tuple(slice(size) for size in x.shape)]

        return dict(map_with_path(leaf, like))

    def _slot_for(self, name: str, slot: int | None) -> int:
        if slot is not None:
            if not 0 <= slot < len(self.names):
                last = len(self.names) - 1
                raise InputError(f"AdapterBank: slot must be from 0 to {last}, got {slot}")
            return slot
        for wanted in (name, None):
            if wanted in self.names:
                return self.names.index(wanted)
        held = ", ".join(map(str, self.names))
        raise InputError(
            f"AdapterBank: all {len(self.names)} slots are taken by {held}; drop one, or name the"
            " slot to overwrite"
        )


def _slot_axis(path: str, leaf: Any) -> int | None:
    """Where the axis of slots goes among those of one adapter's leaf; None for a mark."""
    name = path.rpartition("/")[2]
    own = next((n for end, n in _OWN_AXES.items() if name.endswith(end)), None)
    return None if own is None else leaf.ndim - own


def _fitted(slots: Params, adapter: Params) -> dict[str, Any]:
    room, leaves = dict(leaves_with_path(slots)), dict(leaves_with_path(adapter))
    misfits = [f"{path} has no room" for path in sorted(leaves.keys() - room.keys())]
    fitted = {}
    for path, space in room.items():
        axis = _slot_axis(path, space)
        if axis is None:
            if path not in leaves and f"{path.rpartition('_lora')[0]}_lora_A" in leaves:
                misfits.append(f"{path} is missing")
            continue
        axis -= 1  # that of slots counts among the leaf's
        shape = (*space.shape[:axis], *space.shape[axis + 1 :])
        if path not in leaves:
            fitted[path] = np.zeros(shape, space.dtype)
            continue
        try:
            rank = shape[rank_axis(path) or 0] if shape else 0
            own = np.asarray(pad_rank(path, np.asarray(leaves[path]), rank))
        except InputError as error:
            misfits.append(str(error))
            continue
        if own.shape != shape:
            misfits.append(f"{path} has shape {leaves[path].shape} where there is {shape}")
        fitted[path] = own.astype(space.dtype)
    if misfits:
        raise InputError(f"AdapterBank: the adapter does not fit: {some_of(misfits)}")
    if whole := whole_parameters(adapter):
        raise InputError(f"AdapterBank: {whole[0]} is a whole parameter, which rows cannot choose")
    return tree_from_paths(fitted)


def _write(slots: Params, adapter: Params, number: Any) -> dict[str, Any]:
    """The slots with one of them replaced."""
    new = dict(leaves_with_path(adapter))

    def leaf(path: str, x: Array) -> Array:
        axis = _slot_axis(path, x)
        if axis is None:
            return x
        at = (slice(None),) * (axis - 1) + (number,)
        return x.at[at].set(new[path])

    return dict(map_with_path(leaf, slots))


_written = jax.jit(_write)
"""Compiled once for all slots and adapters of a bank."""
write_slot = jax.jit(_write, donate_argnums=0)
"""The same in place, where nobody else has the slots: an adapter's bytes move, and no others."""
