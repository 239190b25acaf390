"""Biases of the base that an adapter trains whole."""

from collections.abc import Iterable, Sequence
from typing import Any

from .._config import LoraConfig
from .._errors import InputError


def trained_biases(paths: Iterable[str], bias: str, kernels: Iterable[str]) -> list[str]:
    """Those of the paths that are biases which `config.bias` trains, in their order.

    Args:
        paths: Of parameters: the base's, an adapter's, or those of both.
        bias: `"all"`, every parameter called `bias`; `"lora_only"`, those beside adapted
            kernels; or `"none"`.
        kernels: Paths of the adapted parameters.

    Example:
        >>> paths = ["q/kernel", "q/bias", "norm/bias"]
        >>> trained_biases(paths, "all", ["q/kernel"])
        ['q/bias', 'norm/bias']
        >>> trained_biases(paths, "lora_only", ["q/kernel"])
        ['q/bias']

    Source: PEFT's `bias`.
    """
    if bias == "all":
        return [path for path in paths if path.rpartition("/")[2] == "bias"]
    beside = {bias_of(path) for path in kernels if is_layer(path)} if bias == "lora_only" else ()
    return [path for path in paths if path in beside]


def bias_of(param_path: str) -> str:
    """The path of a layer's own bias, beside its kernel.

    Example:
        >>> bias_of("layers/q/kernel"), bias_of("kernel")
        ('layers/q/bias', 'bias')
    """
    module, _, _ = param_path.rpartition("/")
    return f"{module}/bias" if module else "bias"


def is_layer(param_path: str) -> bool:
    """Whether the parameter is a layer's kernel, whose output a bias can be added to."""
    return param_path.rpartition("/")[2] == "kernel"


def check_biases(biases: Sequence[str], config: LoraConfig, targets: Sequence[Any]) -> None:
    """Refuse to train biases that are not there, or that share an array with frozen ones.

    Args:
        biases: As from `trained_biases`.
        config: Its `bias` says which.
        targets: As from `find_targets`.
    """
    if config.bias == "none":
        return
    if not biases:
        whose = "this base" if config.bias == "all" else "no adapted layer of this base"
        has = "has none" if config.bias == "all" else "has one"
        raise InputError(
            f"lora: bias={config.bias!r} trains biases, and {whose} {has}; use bias='none'"
        )
    check_whole_stacks(biases, config, targets)


def check_whole_stacks(biases: Sequence[str], config: LoraConfig, targets: Sequence[Any]) -> None:
    """Refuse `"lora_only"` where a stack's one array of biases is only trained in part."""
    for target in targets if config.bias == "lora_only" else ():
        if 0 in target.ranks and bias_of(target.path) in biases:
            name = target.names[target.ranks.index(0)]
            raise InputError(
                f"lora: bias='lora_only' would train {bias_of(target.path)} of all stacked layers,"
                f" and {name} is not adapted; adapt every layer, or use bias='none' or 'all'"
            )


def check_bias_target(param_path: str) -> None:
    """Refuse `lora_bias` where there is no layer whose output it could be added to."""
    if not is_layer(param_path):
        raise InputError(
            f"{param_path}: lora_bias is for layers with a kernel, and an embedding or another"
            " parameter is none; take it out of target_modules, or lora_bias out of the config"
        )
