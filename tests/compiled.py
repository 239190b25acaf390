"""Models run as one compiled program each: eagerly they are hundreds of tiny ones."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def init(module: Any, key: Any, *inputs: Any) -> Any:
    """A module's fresh params."""
    return _of(_init, module)(key, *inputs)


def apply(module: Any, params: Any, *inputs: Any) -> Any:
    """The output of a module, or of a `lora_linen`."""
    return _of(_apply, module)(params, *inputs)


def _of(program: Any, module: Any) -> Callable[..., Any]:
    try:
        return program(module)
    except TypeError:  # lists and dicts have no hash
        return program.__wrapped__(module)


@functools.cache
def _init(module: Any) -> Callable[..., Any]:
    return jax.jit(lambda key, *inputs: module.init(key, *inputs)["params"])


@functools.cache
def _apply(module: Any) -> Callable[..., Any]:
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))
