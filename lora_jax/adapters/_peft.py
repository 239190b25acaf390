"""Adapters in PEFT's file format: its names and transposes, here and nowhere else.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; the keys are
`base_model.model.<dotted module>.lora_A.weight` (rank, d_in) and `.lora_B.weight`
(d_out, rank), a pair for every single layer.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._config import PEFT_DEFAULTS, LoraConfig
from .._errors import InputError
from .._files import atomic_directory, atomic_file, open_tensors, write_tensors
from .._names import hf_keys, is_kernel
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Params
from ..lora import (
    Layouts,
    Target,
    adapter_names,
    check_untied,
    is_embedding,
    is_target,
    is_within,
    leaf_shape,
    matched_targets,
    paths_of_layers,
    rule_for,
    saved_modules,
)
from ..quant import QuantizedTensor, config_of, quantize

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    directory: str | Path,
    adapter: Params,
    config: LoraConfig,
    *,
    layouts: Layouts | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as PEFT does; PEFT, vLLM and others load it.

    Stacked layers are written one by one, each trimmed to its own rank; layers without an
    adapter are left out.  Files appear whole or not at all.

    Args:
        directory: Where to; an adapter already there is replaced.
        adapter: As from `init_adapter`.
        config: The config it was made with.
        layouts: The layouts it was made with.
        base_model: Name or path of the base, for the file's `base_model_name_or_path`.

    Raises:
        InputError: if the adapter is not the config's (its modules, ranks, scaling), if a
            part of it cannot be written (an adapted embedding, a layer without a name), or if
            the disk is full.

    Example:
        >>> import jax, tempfile
        >>> from lora_jax import init_adapter
        >>> base = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"])
        >>> adapter = init_adapter(jax.random.key(0), base, config)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(directory, adapter, config)
        ...     loaded, _ = load_adapter(directory, base)
        >>> bool((loaded["q_proj"]["lora_A"] == adapter["q_proj"]["lora_A"]).all())
        True
    """
    directory = Path(directory)
    _check_saved_modules(adapter, config)
    tensors = dict(_tensors(adapter, config, layouts))
    if not tensors:
        raise InputError("save_adapter: the adapter is empty; nothing was saved")
    # Sorted as PEFT's are, but for patterns: the first that matches wins.
    fields = dict(sorted(_config_to_peft(adapter, config, base_model).items()))
    text = json.dumps(fields, indent=2)

    def write(into: Path) -> None:
        # Both are complete before either takes its place, so that a full disk changes nothing.
        with atomic_file(into / WEIGHTS_FILE) as weights, atomic_file(into / CONFIG_FILE) as file:
            write_tensors(weights, tensors)
            file.write_text(text + "\n")

    if directory.exists():
        write(directory)
    else:
        with atomic_directory(directory) as temporary:
            write(temporary)


def load_adapter(
    directory: str | Path, base_params: Params, *, layouts: Layouts | None = None
) -> tuple[dict[str, Any], LoraConfig]:
    """Read an adapter that this library or PEFT wrote, checked against its base.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base_params: The base's parameters, or their shapes.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        (adapter, config): the adapter as `init_adapter` shapes it, in the file's dtype.

    Raises:
        InputError: for a missing or broken file, a pickle, an option that is not supported,
            or an adapter that was made for another base.

    Example: see `save_adapter`.
    """
    directory = Path(directory)
    config = _fitting(read_config(directory), base_params)
    targets = matched_targets(base_params, config, layouts=layouts)
    if not targets:
        raise InputError(
            f"{directory / CONFIG_FILE}: target_modules {config.target_modules} match nothing in"
            f" this base; the adapter was made for another base"
        )
    with open_tensors(_weights_file(directory)) as file:
        unread = set(file.keys())

        def take(key: str, shape: tuple[int, ...]) -> np.ndarray:
            return _take(file, unread, directory, key, shape)

        leaves: dict[str, Any] = {}
        for target in targets:
            leaves.update(_read_target(target, take))
        params = dict(leaves_with_path(base_params))
        for path in saved_modules(base_params, config):
            check_untied(path, params)
            leaves[path] = _read_whole(path, params[path], layouts, take)
        unread -= _copies_of_base(file, unread, directory, params, layouts)
    if unread:
        raise InputError(_unexpected(directory, sorted(unread)))
    dtype = str(leaves[adapter_names(targets[0].path)[0]].dtype)
    return tree_from_paths(leaves), dataclasses.replace(config, adapter_dtype=dtype)


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
    return LoraConfig.from_dict(raw, where=str(path))


def _fitting(config: LoraConfig, base_params: Params) -> LoraConfig:
    """Without the `modules_to_save` this base lacks: PEFT lists every name a head may have."""
    paths = [path.rpartition("/")[0] for path, _ in leaves_with_path(base_params)]
    kept = [n for n in config.modules_to_save or [] if any(is_within(p, n) for p in paths)]
    return dataclasses.replace(config, modules_to_save=kept or None)


def _tensors(
    adapter: Params, config: LoraConfig, layouts: Layouts | None
) -> Iterator[tuple[str, np.ndarray]]:
    leaves = dict(leaves_with_path(adapter))
    for path, leaf in leaves.items():
        name = path.rsplit("/", 1)[-1]
        if "lora_" not in name:
            yield from _whole_tensors(path, np.asarray(leaf), layouts)
        elif name.endswith("lora_A"):
            yield from _pair_tensors(path, leaves, config, layouts)


def _pair_tensors(
    path_a: str, leaves: dict[str, Any], config: LoraConfig, layouts: Layouts | None
) -> Iterator[tuple[str, np.ndarray]]:
    prefix = path_a.removesuffix("lora_A")
    parts = [f"{prefix}lora_{x}" for x in ("A", "B", "scaling")]
    if missing := [part for part in parts if part not in leaves]:
        raise InputError(f"save_adapter: the adapter has {path_a} but no {missing[0]}")
    a, b, scalings = (np.asarray(leaves[part]) for part in parts)
    # `w_lora_A` belongs to the raw parameter `w`, `lora_A` to the module itself.
    of_module = not prefix or prefix.endswith("/")
    module = prefix.removesuffix("/" if of_module else "_")
    param = f"{module}/kernel" if of_module else module
    if not module or is_embedding(param):
        what = "an adapter on an embedding" if module else "a layer without a name"
        raise InputError(f"{path_a}: {what} cannot be saved in PEFT's format; exclude it")
    layout = rule_for(layouts, param)
    if a.ndim != 2 + (layout.stack is not None):
        raise InputError(
            f"{path_a} has shape {a.shape}: pass the layouts the adapter was made with"
        )
    if layout.stack is None:
        a, b, scalings = a[None], b[None], scalings[None]
    for i, name in enumerate(paths_of_layers(module, layout, a.shape)):
        rank, expected = config.rank(name), config.scaling(name)
        if is_target(name, param, config) != bool(scalings[i]):
            has, gives = ("an", "none") if scalings[i] else ("no", "one")
            raise InputError(
                f"save_adapter: {name} has {has} adapter, but the config gives it {gives}; pass"
                " the config the adapter was made with"
            )
        if not scalings[i]:
            continue
        if not np.isclose(scalings[i], expected, rtol=1e-6):
            raise InputError(
                f"{prefix}lora_scaling is {scalings[i]:g} at {name}, but the config gives"
                f" {expected:g}; pass the config the adapter was made with, and train through"
                " optim.freeze_base, which leaves the scaling alone"
            )
        if rank > a.shape[-1] or a[i, :, rank:].any() or b[i, rank:].any():
            raise InputError(
                f"save_adapter: {name} has rank {_used_rank(a[i], b[i])}, but the config gives"
                f" {rank}; pass the config the adapter was made with"
            )
        key = f"{_PREFIX}{name.replace('/', '.')}"
        yield f"{key}.lora_A.weight", a[i, :, :rank].T
        yield f"{key}.lora_B.weight", b[i, :rank].T


def _used_rank(a: np.ndarray, b: np.ndarray) -> int:
    used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    return int(used[-1]) + 1 if len(used) else a.shape[-1]


def _check_saved_modules(adapter: Params, config: LoraConfig) -> None:
    """Whole modules of the adapter are the config's, and the other way round."""
    whole = [p for p, _ in leaves_with_path(adapter) if "lora_" not in p.rpartition("/")[2]]
    found = {p: [n for n in config.modules_to_save or [] if is_within(p, n)] for p in whole}
    for path, names in found.items():
        if not names:
            raise InputError(
                f"save_adapter: the adapter holds {path} whole, but the config's modules_to_save"
                f" {config.modules_to_save} does not name it; pass the config it was made with"
            )
    named = {name for names in found.values() for name in names}
    if missing := set(config.modules_to_save or []) - named:
        raise InputError(
            f"save_adapter: modules_to_save {min(missing)!r} is not in the adapter; pass the config"
            " it was made with"
        )


def _whole_tensors(
    path: str, leaf: np.ndarray, layouts: Layouts | None
) -> Iterator[tuple[str, np.ndarray]]:
    keys, stacked = _whole_keys(path, leaf.shape, layouts)
    for key, value in zip(keys, leaf if stacked else leaf[None], strict=True):
        yield key, value.T if is_kernel(path) else value


def _whole_keys(
    path: str, shape: tuple[int, ...], layouts: Layouts | None
) -> tuple[list[str], bool]:
    stack = rule_for(layouts, path).stack
    stacked = [] if stack is None else [stack]
    keys = hf_keys(path, stacked, shape[0] if stacked else 1)
    return [_PREFIX + key for key in keys], stack is not None


def _read_target(target: Target, take: Any) -> Iterator[tuple[str, Any]]:
    """`lora_A`, `lora_B` and `lora_scaling` of a target, padded to its largest rank."""
    if is_embedding(target.path):
        raise InputError(f"{target.path}: adapters on embeddings (lora_embedding_A) are not read")
    width, pairs = max(target.ranks), []
    for name, rank in zip(target.names, target.ranks, strict=True):
        a, b = np.zeros((target.d_in, 0)), np.zeros((0, target.d_out))
        if rank:
            key = f"{_PREFIX}{name.replace('/', '.')}"
            a = take(f"{key}.lora_A.weight", (rank, target.d_in)).T
            b = take(f"{key}.lora_B.weight", (target.d_out, rank)).T
        pairs.append(
            (np.pad(a, ((0, 0), (0, width - rank))), np.pad(b, ((0, width - rank), (0, 0))))
        )
    dtype = next(a.dtype for (a, _), rank in zip(pairs, target.ranks, strict=True) if rank)
    stacks = [np.stack([pair[i] for pair in pairs]).astype(dtype) for i in (0, 1)]
    stacks.append(np.asarray(target.scalings, np.float32))
    for path, value in zip(adapter_names(target.path), stacks, strict=True):
        yield path, jnp.asarray(value if target.stacked else value[0])


def _copies_of_base(
    file: Any, unread: set[str], directory: Path, params: dict[str, Any], layouts: Layouts | None
) -> set[str]:
    """The base's own weights in the file: PEFT saves embeddings and heads that it adapts.

    They must be this base's: reading on with others would give another model's numbers.
    """
    bare = {key.replace(".base_layer.", "."): key for key in unread}
    found = set()
    for path, leaf in params.items():
        keys, stacked = _whole_keys(path, leaf_shape(leaf)[0], layouts)
        for i, key in enumerate(keys):
            if key not in bare:
                continue
            value = file.get_tensor(bare[key])
            if not _equals(value.T if is_kernel(path) else value, leaf, i if stacked else None):
                raise InputError(
                    f"{directory / WEIGHTS_FILE}: {bare[key]} {value.shape} is a weight of the"
                    f" base, and not this base's {path}; the adapter was made for another base, or"
                    " one that was changed (new tokens, say)"
                )
            found.add(bare[key])
    return found


def _equals(value: np.ndarray, leaf: Any, layer: int | None) -> bool:
    """Whether a base's weight is this value, rounded; of mere shapes, whether it fits."""
    shape, dtype = leaf_shape(leaf)
    if value.shape != (shape if layer is None else shape[1:]):
        return False
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf)):
        return True
    own = leaf if layer is None else jax.tree.map(lambda x: x[layer], leaf)
    if isinstance(own, QuantizedTensor) and not own.flat:
        again = quantize(jnp.asarray(value, dtype), config_of(own), contracting=own.contracting)
        pairs = zip(jax.tree.leaves(own), jax.tree.leaves(again), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)
    own = np.asarray(meta.unbox(own))
    # Rounded to the type of either: a base in float32 may have been trained in bfloat16.
    return any(np.array_equal(own.astype(t), value.astype(t)) for t in (own.dtype, value.dtype))


def _read_whole(path: str, leaf: Any, layouts: Layouts | None, take: Any) -> Any:
    shape, _ = leaf_shape(leaf)
    keys, stacked = _whole_keys(path, shape, layouts)
    own = shape[1:] if stacked else shape
    values = [take(key, own[::-1] if is_kernel(path) else own) for key in keys]
    values = [v.T if is_kernel(path) else v for v in values]
    return jnp.asarray(np.stack(values) if stacked else values[0])


def _take(
    file: Any, unread: set[str], directory: Path, key: str, shape: tuple[int, ...]
) -> np.ndarray:
    if key not in unread:
        raise InputError(
            f"{directory / WEIGHTS_FILE}: no tensor {key}, which the config and this base call"
            f" for; there is, for example, {min(unread, default='nothing')}"
        )
    unread.remove(key)
    tensor = file.get_tensor(key)
    if tensor.shape != shape:
        raise InputError(
            f"{directory / WEIGHTS_FILE}: {key} has shape {tensor.shape}, this base needs {shape};"
            " the adapter was made for another base"
        )
    return tensor


def _unexpected(directory: Path, keys: list[str]) -> str:
    features = {"lora_magnitude_vector": "DoRA", "lora_embedding": "an adapted embedding"}
    found = next((v for k, v in features.items() if any(k in key for key in keys)), None)
    what = f"{found} is not supported" if found else "the adapter was made for another base"
    return f"{directory / WEIGHTS_FILE}: {len(keys)} tensors have no place, {keys[0]} first; {what}"


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS_FILE
    pickled = directory / "adapter_model.bin"
    return pickled if pickled.exists() and not path.exists() else path


def _config_to_peft(adapter: Params, config: LoraConfig, base_model: str | None) -> dict[str, Any]:
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
