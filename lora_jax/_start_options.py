"""Options of starts that look at data: PEFT's `eva_config`, `corda_config`, `lora_ga_config`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ._errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class _Option:
    """PEFT's default of an option, and what else it may be."""

    default: Any
    rule: str
    accepts: Callable[[Any], bool]


def _one_of(default: Any, *others: Any) -> _Option:
    values = (default, *others)
    said = ", ".join(repr(value) for value in values)
    rule = said if others else f"{said}, nothing else is supported"
    return _Option(
        default, rule, lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def _number(default: float, rule: str, low: float, high: float = math.inf) -> _Option:
    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return _Option(default, rule, accepts)


def _switch(default: bool) -> _Option:
    return _Option(default, "true or false", lambda value: isinstance(value, bool))


_OPTIONS: Mapping[str, Mapping[str, _Option]] = {
    "eva": {
        "rho": _number(2.0, "a number of at least 1", 1.0),
        "tau": _number(0.99, "a number from 0 to 1", 0.0, 1.0),
        "use_label_mask": _switch(True),
        "label_mask_value": _Option(-100, "an integer", lambda value: type(value) is int),
        "whiten": _switch(False),
        "adjust_scaling_factors": _switch(True),
    },
    "corda": {
        "corda_method": _one_of("ipm", "kpm"),
        "cache_file": _one_of(None),
        "covariance_file": _one_of(None),
        "use_float16_for_covariance": _one_of(False),
        "verbose": _one_of(False),
        "prune_temporary_fields": _one_of(True),
    },
    "lora_ga": {
        "direction": _one_of("ArB2r", "A2rBr", "ArBr", "random"),
        "scale": _one_of("stable", "weight_svd", "gd_scale", "unit"),
        "stable_gamma": _Option(
            16, "a positive integer", lambda value: type(value) is int and value > 0
        ),
    },
}
STARTS_FROM_DATA = tuple(_OPTIONS)
"""Starts that look at batches of data; `NAME_config` holds the options of each."""


def start_options(name: str, given: Any, init: Any) -> dict[str, Any] | None:
    """The options of a start, whole; None where the config starts in another way.

    Args:
        name: The start, one of `STARTS_FROM_DATA`.
        given: What `NAME_config` says: some of PEFT's options, or None.
        init: The config's `init_lora_weights`.

    Raises:
        InputError: for an unknown option, a value out of its range, or options of a start that
            the config does not take.

    Example:
        >>> start_options("lora_ga", {"scale": "unit"}, "lora_ga")
        {'direction': 'ArB2r', 'scale': 'unit', 'stable_gamma': 16}
    """
    field, options = f"{name}_config", _OPTIONS[name]
    if init != name:
        if given is not None:
            raise InputError(
                f"lora: {field} goes with init_lora_weights={name!r}, not {init!r}; leave one out"
            )
        return None
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"lora: {field} must be a section of options, got {given!r}")
    for key, value in (given or {}).items():
        if key not in options:
            known = f"; known: {', '.join(options)}"
            raise InputError(
                f"lora: {field}: unknown option {key!r}{nearest(str(key), options) or known}"
            )
        if not options[key].accepts(value):
            raise InputError(f"lora: {field} {key}={value!r}: use {options[key].rule}")
    return {key: option.default for key, option in options.items()} | dict(given or {})
