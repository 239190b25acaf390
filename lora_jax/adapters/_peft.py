"""PEFT's file format: what its files and tensors are called, and what its config holds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .._config import LoraConfig
from .._errors import InputError
from .._names import hf_keys
from .._peft_fields import PEFT_DEFAULTS
from .._start_options import STARTS_FROM_DATA
from .._tree import leaves_with_path
from .._typing import Params
from ..lora import Layouts, is_embedding, rule_for

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices")
"""Fields of the config that hold names of modules."""
PREFIX = "base_model.model."
"""What PEFT puts before the base's own names."""


def module_key(name: str) -> str:
    """The key of a module, which its tensors' names follow.

    Example:
        >>> module_key("model/layers/0/q_proj")
        'base_model.model.model.layers.0.q_proj'
    """
    return PREFIX + name.replace("/", ".")


def factor_keys(key: str, param: str) -> tuple[str, str]:
    """The keys of a module's two factors: an embedding's have names of their own.

    Example:
        >>> factor_keys("wte", "wte/embedding")
        ('wte.lora_embedding_A', 'wte.lora_embedding_B')
    """
    if is_embedding(param):
        return f"{key}.lora_embedding_A", f"{key}.lora_embedding_B"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight"


def tokens_key(name: str) -> str:
    """The key of a module's trained rows, which PEFT calls deltas: they are the rows themselves."""
    return f"{module_key(name)}.token_adapter.trainable_tokens_delta"


def whole_keys(
    path: str, shape: tuple[int, ...], layouts: Layouts | None
) -> tuple[list[str], bool]:
    """The keys of a parameter that is kept whole, and whether it stands for a stack of layers."""
    stack = rule_for(layouts, path).stack
    stacked = [] if stack is None else [stack]
    keys = hf_keys(path, stacked, shape[0] if stacked else 1)
    return [PREFIX + key for key in keys], stack is not None


def below_wrapper(key: str) -> str:
    """The key of a layer's own tensor once PEFT has wrapped the layer.

    Example:
        >>> below_wrapper("base_model.model.q_proj.bias")
        'base_model.model.q_proj.base_layer.bias'
    """
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def read_config(directory: str | Path) -> LoraConfig:
    """The `adapter_config.json` of a directory.

    Raises:
        InputError: if it is missing, broken, or asks for what is not supported.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError:
        raise InputError(f"{path}: no such file; an adapter directory holds one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return LoraConfig.from_dict(_own_start(raw), where=str(path))


def _own_start(raw: dict[str, Any]) -> dict[str, Any]:
    """Without options of other starts: PEFT keeps those of one that it has made plain.

    MiCA moves no base: once trained, its adapter is one like any other.
    """
    init = raw.get("init_lora_weights", True)
    others = {f"{name}_config" for name in STARTS_FROM_DATA if name != init}
    own = {name: value for name, value in raw.items() if name not in others}
    return own | {"init_lora_weights": True} if init == "mica" else own


def config_to_peft(adapter: Params, config: LoraConfig, base_model: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter."""
    own = {k: v for k, v in dataclasses.asdict(config).items() if k != "adapter_dtype"}
    if config.target_modules == "all-linear":
        own["target_modules"] = sorted(
            {p.split("/")[-2] for p, _ in leaves_with_path(adapter) if p.endswith("/lora_A")}
        )
    for field in _NAMES:
        own[field] = _dotted(own[field])
    if config.target_parameters:
        # Without target_modules PEFT would choose some by the model's family.
        own["target_modules"] = own["target_modules"] or []
        own["target_parameters"] = [_torch_name(name) for name in config.target_parameters]
    facts = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_version": None,
        "revision": None,
    }
    return {**PEFT_DEFAULTS, **own, **facts}


def _dotted(names: Any) -> Any:
    """Names of modules as PEFT compares them, alone or with their ids; what is no name stays."""
    if isinstance(names, dict):
        return {name.replace("/", "."): ids for name, ids in names.items()}
    if isinstance(names, list):
        return [name.replace("/", ".") if isinstance(name, str) else name for name in names]
    return names


def _torch_name(name: str) -> str:
    module, dot, param = name.replace("/", ".").rpartition(".")
    return f"{module}{dot}{'weight' if param == 'kernel' else param}"


def weights_file(directory: Path) -> Path:
    """Where an adapter's tensors are; a pickle only if there is nothing else, to be refused."""
    path = directory / WEIGHTS_FILE
    pickled = directory / "adapter_model.bin"
    return pickled if pickled.exists() and not path.exists() else path
