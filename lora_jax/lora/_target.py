"""One adapted parameter, and the names by which a config knows it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .._config import LoraConfig
from ._layout import KernelLayout

LAYER_PARAMS = ("kernel", "embedding")
"""Parameters that `target_modules` knows by their module; any other by its own path."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter: a single layer's, or one of a stack with a rank per layer."""

    path: str
    """Path of the parameter in the tree, `model/layers/self_attn/q_proj/kernel`."""
    names: tuple[str, ...]
    """Module path of each single layer, `model/layers/0/self_attn/q_proj`, ..."""
    ranks: tuple[int, ...]
    """Rank of each single layer; 0 where the layer is not adapted."""
    scalings: tuple[float, ...]
    d_in: int
    d_out: int
    layout: KernelLayout
    experts: int | None = None
    """How many matrices a layer has, each with a pair of factors; None for one alone."""

    @property
    def stacked(self) -> bool:
        return self.layout.stack is not None

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes in front of a single matrix: (layers, experts), or those there are."""
        layers = (len(self.names),) if self.stacked else ()
        return layers if self.experts is None else (*layers, self.experts)

    @property
    def parameters(self) -> int:
        """Numbers in all its factors; what only pads layers to a common rank is none."""
        return (self.experts or 1) * sum(self.ranks) * (self.d_in + self.d_out)

    def of_matrices(self, of_layers: Sequence[float]) -> np.ndarray:
        """One number for each matrix from one for each layer."""
        return np.repeat(of_layers, self.experts or 1)


def target_name(param_path: str) -> str:
    """What `target_modules` matches: the module's path, or a raw parameter's own."""
    module, _, param = param_path.rpartition("/")
    return module if param in LAYER_PARAMS else param_path


def parameter_names(name: str, param_path: str) -> tuple[str, ...]:
    """What `target_parameters` matches of a single layer: its own path, and PEFT's for a kernel.

    Example:
        >>> parameter_names("layers/0/mlp/up", "layers/mlp/up/kernel")
        ('layers/0/mlp/up/weight', 'layers/0/mlp/up/kernel')
        >>> parameter_names("layers/0/experts/down", "layers/experts/down")
        ('layers/0/experts/down',)
    """
    param = param_path.rpartition("/")[2]
    if param == "embedding":  # it is looked up, and PEFT's file has another form for it
        return ()
    return (f"{name}/weight", f"{name}/kernel") if param == "kernel" else (name,)


def is_parameter(name: str, param_path: str, config: LoraConfig) -> bool:
    """Whether `target_parameters` chooses a single layer of a parameter.

    Example:
        >>> config = LoraConfig(target_parameters=["experts.down"])
        >>> is_parameter("layers/0/experts/down", "layers/experts/down", config)
        True
    """
    return entry_of(name, param_path, config) is not None


def entry_of(name: str, param_path: str, config: LoraConfig) -> int | None:
    """The number of the first of `target_parameters` that chooses a single layer, if any does."""
    own = parameter_names(name, param_path)
    entries = enumerate(config.target_parameters or [])
    return next((i for i, entry in entries if any(is_or_ends_with(n, entry) for n in own)), None)


def pattern_name(name: str, param_path: str, config: LoraConfig) -> str:
    """The name of a single layer by which `rank_pattern` and `alpha_pattern` know it."""
    named = is_parameter(name, param_path, config)
    return parameter_names(name, param_path)[0] if named else name


def is_or_ends_with(path: str, name: str) -> bool:
    """Whether a path is a name, or ends with it, whole parts compared."""
    path, name = path.replace("/", "."), name.replace("/", ".")
    return path == name or path.endswith(f".{name}")


def is_within(dotted: str, name: str) -> bool:
    """Whether a path is a module of this name, or below one."""
    parts = dotted.replace("/", ".").split(".")
    return any(is_or_ends_with(".".join(parts[: i + 1]), name) for i in range(len(parts)))


def is_saved(path: str, name: str) -> bool:
    """Whether a path is a module that `modules_to_save` names, or below one.

    PEFT compares the ends of names letter by letter: "norm" is "input_layernorm" too.

    Example:
        >>> is_saved("layers/0/input_layernorm", "norm"), is_saved("norms/first", "norm")
        (True, False)
    """
    parts, name = path.replace("/", ".").split("."), name.replace("/", ".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def parts_of(name: str, pattern: str) -> set[str]:
    """What in a path could be meant by a name: all runs of so many parts.

    Example:
        >>> sorted(parts_of("layers/experts/up", "expert.up"))
        ['experts.up', 'layers.experts']
    """
    names, length = name.split("/"), len(pattern.replace("/", ".").split("."))
    return {".".join(names[i : i + length]) for i in range(len(names) - length + 1)}
