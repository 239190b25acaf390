"""PEFT's file format: what its files and tensors are called, and what its config holds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .._config import PEFT_DEFAULTS, LoraConfig
from .._errors import InputError
from .._names import hf_keys
from .._start_options import STARTS_FROM_DATA
from .._tree import leaves_with_path
from .._typing import Params
from ..lora import Layouts, rule_for

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the base's own names."""


def module_key(name: str) -> str:
    """The key of a module, which its tensors' names follow.

    Example:
        >>> module_key("model/layers/0/q_proj")
        'base_model.model.model.layers.0.q_proj'
    """
    return PREFIX + name.replace("/", ".")


def whole_keys(
    path: str, shape: tuple[int, ...], layouts: Layouts | None
) -> tuple[list[str], bool]:
    """The keys of a parameter that is kept whole, and whether it stands for a stack of layers."""
    stack = rule_for(layouts, path).stack
    stacked = [] if stack is None else [stack]
    keys = hf_keys(path, stacked, shape[0] if stacked else 1)
    return [PREFIX + key for key in keys], stack is not None


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
    """Without options of other starts: PEFT keeps those of one that it has made plain."""
    init = raw.get("init_lora_weights", True)
    others = {f"{name}_config" for name in STARTS_FROM_DATA if name != init}
    return {name: value for name, value in raw.items() if name not in others}


def config_to_peft(adapter: Params, config: LoraConfig, base_model: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter."""
    own = {k: v for k, v in dataclasses.asdict(config).items() if k != "adapter_dtype"}
    if config.target_modules == "all-linear":
        own["target_modules"] = sorted(
            {p.split("/")[-2] for p, _ in leaves_with_path(adapter) if p.endswith("/lora_A")}
        )
    facts = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_version": None,
        "revision": None,
    }
    return {**PEFT_DEFAULTS, **own, **facts}


def weights_file(directory: Path) -> Path:
    """Where an adapter's tensors are; a pickle only if there is nothing else, to be refused."""
    path = directory / WEIGHTS_FILE
    pickled = directory / "adapter_model.bin"
    return pickled if pickled.exists() and not path.exists() else path
