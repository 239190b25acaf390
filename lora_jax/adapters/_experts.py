"""Raw parameters in PEFT's files: all experts in one pair, and keys that name no parameter.

PEFT wraps a module once for each of its adapted parameters, in the order in which the module
declares them.  The last has the module's own key, each one before it a `base_layer` more.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from ..lora import Target, entry_of
from ._peft import module_key

Shapes = Callable[[str], tuple[int, ...] | None]
"""From a key to the shape of its tensor; None where there is none."""
NESTING = {"parameter_order": "target_parameters"}
"""What the files written here say: parameters of a module are nested as the config lists them."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One adapted parameter of one single module."""

    name: str
    """Its path, or its module's if it is a kernel."""
    path: str
    """Its path in the tree, where layers may be stacked."""
    pair: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    """Shapes of `lora_A.weight` and `lora_B.weight`."""

    @property
    def module(self) -> str:
        kernel = self.path.rpartition("/")[2] == "kernel"
        return self.name if kernel else self.name.rpartition("/")[0]

    @property
    def leaf(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def flipped(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes if PEFT took the output for the input."""
        (rows, d_in), (d_out, _) = self.pair
        return (rows, d_out), (d_in, rows)


def pack(lora_A: np.ndarray, lora_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of all experts as PEFT's two matrices: A's rows by expert, B's columns by rank.

    Args:
        lora_A: (experts, d_in, rank).
        lora_B: (experts, rank, d_out).

    Returns:
        (experts·rank, d_in) and (d_out, rank·experts).

    Example:
        >>> a, b = pack(np.zeros((3, 4, 2)), np.arange(6).reshape(3, 2, 1))
        >>> a.shape, b.tolist()
        ((6, 4), [[0, 2, 4, 1, 3, 5]])
    """
    d_in, d_out = lora_A.shape[1], lora_B.shape[2]
    return lora_A.swapaxes(1, 2).reshape(-1, d_in), lora_B.transpose(2, 1, 0).reshape(d_out, -1)


def unpack(a: np.ndarray, b: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`.

    Example:
        >>> a, b = unpack(np.zeros((6, 4)), np.array([[0, 2, 4, 1, 3, 5]]), 3)
        >>> a.shape, b.ravel().tolist()
        ((3, 4, 2), [0, 1, 2, 3, 4, 5])
    """
    rank = a.shape[0] // experts
    return (
        a.reshape(experts, rank, -1).swapaxes(1, 2),
        b.reshape(-1, rank, experts).transpose(2, 1, 0),
    )


def keys_as_listed(parameters: Iterable[Parameter], config: LoraConfig) -> dict[str, str]:
    """From each parameter's name to its key, nested as `config.target_parameters` lists them.

    Example:
        >>> config = LoraConfig(target_parameters=["experts.up", "experts.down"])
        >>> both = [Parameter(name, name) for name in ("experts/down", "experts/up")]
        >>> keys_as_listed(both, config)["experts/up"]
        'base_model.model.experts.base_layer'
    """
    keys: dict[str, str] = {}
    for module, own in _by_module(parameters).items():
        keys |= _nested(module, sorted(own, key=lambda p: entry_of(p.name, p.path, config) or 0))
    return keys


def keys_as_found(
    parameters: Iterable[Parameter], shapes: Shapes, order: Sequence[str] | None
) -> dict[str, str]:
    """From each parameter's name to its key in a file that does not say how they are nested.

    Args:
        shapes: The file's.
        order: Names of parameters in the order of their declaration; without it their shapes must
            leave but one.

    Raises:
        InputError: if the order lacks a parameter, or shapes leave several orders.
    """
    keys: dict[str, str] = {}
    for module, own in _by_module(parameters).items():
        keys |= _nested(module, _in_order(module, own, shapes, order))
    return keys


def _in_order(
    module: str, own: list[Parameter], shapes: Shapes, order: Sequence[str] | None
) -> list[Parameter]:
    if len(own) == 1:
        return own
    names = [p.leaf for p in own]
    if order is not None:
        if missing := [name for name in names if name not in order]:
            raise InputError(
                f"load_adapter: parameter_order {list(order)} lacks {missing[0]!r}; it must name"
                f" the adapted parameters of {module}: {', '.join(names)}"
            )
        return sorted(own, key=lambda p: order.index(p.leaf))
    # Turned around, too: PEFT guesses which axis is a module's input, and it may have been wrong.
    fitting = [
        list(nested)
        for turned in (False, True)
        for nested in itertools.permutations(own)
        if _fits(module, nested, shapes, turned)
    ]
    if len({tuple(p.name for p in nested) for nested in fitting}) > 1:
        raise InputError(
            f"load_adapter: the file does not name the parameters {', '.join(names)} of {module},"
            " and their shapes fit in several orders; pass parameter_order=[...], their names in"
            " the order in which the module declares them where the adapter was trained"
        )
    return fitting[0] if fitting else own


def _fits(module: str, nested: Sequence[Parameter], shapes: Shapes, turned: bool) -> bool:
    keys = _nested(module, nested)
    wanted = [(keys[p.name], p.flipped if turned else p.pair) for p in nested]
    return all(
        (shapes(f"{key}.lora_A.weight"), shapes(f"{key}.lora_B.weight")) == pair
        for key, pair in wanted
    )


def parameters_of(target: Target) -> list[Parameter]:
    """The adapted parameters of single modules behind a target."""
    count = target.experts or 1
    return [
        Parameter(name, target.path, ((count * r, target.d_in), (target.d_out, r * count)))
        for name, r in zip(target.names, target.ranks, strict=True)
        if r
    ]


def _by_module(parameters: Iterable[Parameter]) -> Mapping[str, list[Parameter]]:
    modules: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    return modules


def _nested(module: str, in_order: Sequence[Parameter]) -> dict[str, str]:
    last = len(in_order) - 1
    return {p.name: module_key(module) + (last - i) * ".base_layer" for i, p in enumerate(in_order)}
