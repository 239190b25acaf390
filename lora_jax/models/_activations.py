"""The nonlinear functions of MLPs, by the names that `config.json` uses."""

import functools
from collections.abc import Callable

import flax.linen as nn

from .._typing import Array

_tanh_gelu = functools.partial(nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "relu": nn.relu,
}
