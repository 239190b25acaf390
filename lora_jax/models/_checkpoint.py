"""What a Hugging Face directory holds: its config and its tensors, found but not read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from .._files import open_tensors
from .._quant_config import QuantConfig
from ..quant import QuantizedTensor, read_bitsandbytes, read_description, split_state
from ._config import ModelConfig
from ._config_json import config_from_hf, read_eos
from ._families import Family

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types a checkpoint may hold: safetensors' name and numpy's."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    state: Mapping[str, "Entry"] | None = None
    """What bitsandbytes keeps beside a weight in four bits, whose shape and dtype are then those
    of the dense one."""

    def read_quantized(self) -> QuantizedTensor:
        """The kernel of a weight that has a state."""
        state = {name: entry.read() for name, entry in (self.state or {}).items()}
        return read_bitsandbytes(self.read(), state, name=f"{self.file}: {self.key}")

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor as the file has it, or a range of it: no other bytes are copied."""
        # Opened anew for each tensor: pages of a file that stays mapped count as used memory.
        with open_tensors(self.file) as tensors:
            if index is None:
                return tensors.get_tensor(self.key)
            return tensors.get_slice(self.key)[index]


def read_config(directory: str | Path) -> ModelConfig:
    """The model's shape from `config.json`; the ids that end a text from `generation_config.json`.

    Raises:
        InputError: if the directory or the file is missing or broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such directory; give one with config.json and *.safetensors, or a"
            " name such as Qwen/Qwen3-0.6B"
        )
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; give the directory of a Hugging Face model")
    config = config_from_hf(_json(path), str(path))
    path = directory / "generation_config.json"
    if not path.exists():
        return config
    # Generation ends where this file says: chat models add their end of turn only here.
    eos = _json(path).get("eos_token_id")
    if eos is None:
        return config
    return dataclasses.replace(config, eos_token_id=read_eos(eos, str(path)))


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a checkpoint keeps its weights, as its config tells."""

    dtype: str
    quant: QuantConfig | None


def read_storage(directory: Path) -> Storage:
    """The dtype that `config.json` names, float32 where it names none, and any four-bit format."""
    path = directory / "config.json"
    raw = _json(path)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(dtype, str):
        raise InputError(f"{path}: dtype: must be a name such as bfloat16, got {dtype!r}")
    float_dtype(dtype, f"{path}: dtype")
    told = raw.get("quantization_config")
    if not told:
        return Storage(dtype, None)
    if not isinstance(told, dict):
        raise InputError(f"{path}: quantization_config: must be a JSON object, got {told!r}")
    format = told.get("bnb_4bit_quant_type", "fp4")
    if format not in ("fp4", "nf4"):
        raise InputError(
            f"{path}: quantization_config: bnb_4bit_quant_type: must be fp4 or nf4, got {format!r}"
        )
    nested = bool(told.get("bnb_4bit_use_double_quant", False))
    return Storage(dtype, QuantConfig(format, double_quant=nested))


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> list[Path]:
    """The one file, or those the index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in directory.glob(s))
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise InputError(
            f"{directory}: {found}; save the model as safetensors"
            " (transformers: model.save_pretrained(directory))"
        )
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty; copy the file again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise InputError(f"{index}: {name!r} is not the name of a file in this directory")
    return [directory / name for name in names]


def checkpoint_entries(directory: Path, family: Family) -> dict[str, Entry]:
    """Every parameter of the checkpoint by its full name."""
    entries = {}
    for file in _weight_files(directory):
        with open_tensors(file) as tensors:
            names = tensors.keys()
            for key in names:
                view = tensors.get_slice(key)
                entries[key] = Entry(file, key, tuple(view.get_shape()), view.get_dtype())
    # Saved from the bare decoder, the names lack their first part.
    body, head = f"{family.body}.", f"{family.head}."
    if not any(key.startswith(body) for key in entries):
        entries = {k if k.startswith(head) else body + k: entry for k, entry in entries.items()}
    entries = {k: entry for k, entry in entries.items() if not k.endswith(family.buffers)}
    return _with_states(entries)


def weight_norms(directory: str | Path, modules: Sequence[str]) -> dict[str, float]:
    """Frobenius norms of modules' weights, read one at a time.

    Args:
        directory: A model's.
        modules: Dotted paths, as in the file.

    Raises:
        InputError: if the directory holds no such model, or no weight of one of the modules.
    """
    family = read_config(directory).family
    entries, norms = checkpoint_entries(Path(directory), family), {}
    for module in modules:
        entry = entries.get(f"{module}.weight")
        if entry is None:
            raise InputError(f"{directory}: has no {module}.weight; the adapter is of another base")
        weight = entry.read() if entry.state is None else entry.read_quantized().unbox()
        norms[module] = float(np.linalg.norm(np.asarray(weight, np.float32)))
    return norms


def _with_states(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries with bitsandbytes' tensors put to the weights they belong to."""
    weights, states = {}, {}
    for key, entry in entries.items():
        if part := split_state(key):
            states.setdefault(part[0], {})[part[1]] = entry
        else:
            weights[key] = entry
    for key, state in states.items():
        if key not in weights:
            raise InputError(
                f"{next(iter(state.values())).file}: {key} is missing, whose absmax"
                " is there; copy the file again"
            )
        entry = weights[key]
        described = {k: v.read() for k, v in state.items() if k.startswith("quant_state")}
        told = read_description(described, f"{entry.file}: {key}")
        dtype = next(short for short, name in DTYPES.items() if name == told["dtype"])
        weights[key] = dataclasses.replace(
            entry, shape=tuple(told["shape"]), dtype=dtype, state=state
        )
    return weights


def float_dtype(name: str, where: str) -> Any:
    """A float dtype by name.

    Raises:
        InputError: for any other name.
    """
    if name not in DTYPES.values():
        raise InputError(f"{where}: {name!r} is not supported; use {', '.join(DTYPES.values())}")
    return jnp.dtype(name)
