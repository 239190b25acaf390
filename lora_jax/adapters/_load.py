"""Adapters that this library or PEFT wrote, read and checked against their base."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._config import LoraConfig
from .._errors import InputError
from .._files import open_tensors
from .._names import is_kernel
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Params
from ..lora import (
    Layouts,
    Target,
    adapter_names,
    bias_name,
    check_untied,
    check_whole_stacks,
    init_with_base,
    is_embedding,
    is_within,
    leaf_shape,
    magnitude_name,
    matched_targets,
    saved_modules,
    trained_biases,
    without_start,
)
from ..quant import QuantizedTensor, config_of, quantize
from ._peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    below_wrapper,
    module_key,
    read_config,
    weights_file,
    whole_keys,
)

_SHOWN = 3
"""How many of the tensors that do not fit an error names."""


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
    params = dict(leaves_with_path(base_params))
    biases = trained_biases(params, config.bias, [target.path for target in targets])
    check_whole_stacks(biases, config, targets)
    if not biases:  # PEFT trains none then, and says so nowhere
        config = dataclasses.replace(config, bias="none")
    with open_tensors(weights_file(directory)) as file:
        take = _Reader(file)
        leaves: dict[str, Any] = {}
        for target in targets:
            leaves.update(_read_target(target, take, config))
        for path in saved_modules(base_params, config):
            check_untied(path, params)
            leaves[path] = _read_whole(path, params[path], layouts, take)
        for path in biases:
            if path not in leaves:
                leaves[path] = _read_whole(path, params[path], layouts, take)
        _drop_copies(take, params, layouts, config)
    take.check(directory / WEIGHTS_FILE)
    dtype = str(leaves[adapter_names(targets[0].path)[0]].dtype)
    adapter, config = tree_from_paths(leaves), dataclasses.replace(config, adapter_dtype=dtype)
    if config.moves_base:
        return _over_unmoved(directory, base_params, adapter, config, layouts)
    return adapter, config


def _over_unmoved(
    directory: Path, base: Params, adapter: Params, config: LoraConfig, layouts: Layouts | None
) -> tuple[dict[str, Any], LoraConfig]:
    """An adapter over this base, of one that was trained over a base which its start had moved."""
    if config.init_lora_weights not in ("pissa", "olora"):
        raise InputError(
            f"{directory / CONFIG_FILE}: init_lora_weights={config.init_lora_weights!r} changed the"
            " base in a way that cannot be found again; convert the adapter where it was trained"
            " (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    start = init_with_base(jax.random.key(0), base, config, layouts=layouts)[1]
    return without_start(adapter, start, config)


def _fitting(config: LoraConfig, base_params: Params) -> LoraConfig:
    """Without the `modules_to_save` this base lacks: PEFT lists every name a head may have."""
    paths = [path.rpartition("/")[0] for path, _ in leaves_with_path(base_params)]
    kept = [n for n in config.modules_to_save or [] if any(is_within(p, n) for p in paths)]
    return dataclasses.replace(config, modules_to_save=kept or None)


class _Reader:
    """The tensors of a file, each read once; what does not fit is noted, and told all together."""

    def __init__(self, file: Any) -> None:
        self.file, self.unread = file, set(file.keys())
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.foreign: list[str] = []

    def __call__(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of this shape; zeros where the file has none."""
        if key not in self.unread:
            self.missing.append(f"no tensor {key}, which the config and this base call for")
            return np.zeros(shape, np.float32)
        self.unread.remove(key)
        tensor = self.file.get_tensor(key)
        if tensor.shape != shape:
            self.misshapen.append(f"{key} has shape {tensor.shape}, this base needs {shape}")
            return np.zeros(shape, np.float32)
        return tensor

    def check(self, path: Path) -> None:
        """Refuse a file that does not fit, with the first of what is wrong of every kind.

        Raises:
            InputError: for tensors that are missing, have another shape or have no place.
        """
        features = {"lora_embedding": " (an adapted embedding is not supported)"}
        foreign = [
            f"no place for {key}{next((v for k, v in features.items() if k in key), '')}"
            for key in sorted(self.unread)
        ]
        kinds = (self.misshapen, self.missing, foreign, self.foreign)
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
        wrong = [problem for problem in in_turn if problem is not None]
        if wrong:
            more = len(wrong) - _SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise InputError(
                f"{path}: {'; '.join(wrong[:_SHOWN])}{rest}; the adapter was made for another base,"
                " or one that was changed (new tokens, say)"
            )


def _read_target(target: Target, take: _Reader, config: LoraConfig) -> Iterator[tuple[str, Any]]:
    """`lora_A`, `lora_B`, `lora_scaling` and more of a target, padded to its largest rank."""
    if is_embedding(target.path):
        raise InputError(f"{target.path}: adapters on embeddings (lora_embedding_A) are not read")
    width, pairs, lengths, biases = max(target.ranks), [], [], []
    for name, rank in zip(target.names, target.ranks, strict=True):
        a, b = np.zeros((target.d_in, 0)), np.zeros((0, target.d_out))
        length, bias = np.ones(target.d_out, np.float32), np.zeros(target.d_out)
        if rank:
            key = module_key(name)
            a = take(f"{key}.lora_A.weight", (rank, target.d_in)).T
            b = take(f"{key}.lora_B.weight", (target.d_out, rank)).T
            if config.use_dora:
                length = take(f"{key}.lora_magnitude_vector", (target.d_out,))
            if config.lora_bias:
                bias = take(f"{key}.lora_B.bias", (target.d_out,))
        lengths.append(length)
        biases.append(bias)
        pairs.append(
            (np.pad(a, ((0, 0), (0, width - rank))), np.pad(b, ((0, width - rank), (0, 0))))
        )
    dtype = next(a.dtype for (a, _), rank in zip(pairs, target.ranks, strict=True) if rank)
    stacks = [np.stack([pair[i] for pair in pairs]).astype(dtype) for i in (0, 1)]
    stacks.append(np.asarray(target.scalings, np.float32))
    names: tuple[str, ...] = adapter_names(target.path)
    if config.use_dora:
        names = (*names, magnitude_name(target.path))
        stacks.append(np.stack(lengths).astype(np.float32))
    if config.lora_bias:
        names = (*names, bias_name(target.path))
        stacks.append(np.stack(biases).astype(dtype))
    for path, value in zip(names, stacks, strict=True):
        yield path, jnp.asarray(value if target.stacked else value[0])


def _drop_copies(
    take: _Reader, params: dict[str, Any], layouts: Layouts | None, config: LoraConfig
) -> None:
    """The base's own weights in the file: PEFT saves embeddings and heads that it adapts.

    They must be this base's: reading on with others would give another model's numbers.
    """
    if config.bias == "all":
        # PEFT takes the biases of `modules_to_save` for some of the base's, and writes them twice.
        take.unread -= {key for key in take.unread if key.endswith(".modules_to_save.bias")}
    bare = {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): key
        for key in take.unread
    }
    for path, leaf in params.items():
        keys, stacked = whole_keys(path, leaf_shape(leaf)[0], layouts)
        for i, key in enumerate(keys):
            if key not in bare:
                continue
            value = take.file.get_tensor(bare[key])
            if not _equals(value.T if is_kernel(path) else value, leaf, i if stacked else None):
                take.foreign.append(
                    f"{bare[key]} {value.shape} is a weight of the base, and not this base's {path}"
                )
            take.unread.remove(bare[key])


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


def _read_whole(path: str, leaf: Any, layouts: Layouts | None, take: _Reader) -> Any:
    shape, _ = leaf_shape(leaf)
    keys, stacked = whole_keys(path, shape, layouts)
    own = shape[1:] if stacked else shape
    # An adapted layer's bias lies below PEFT's wrapper.
    keys = [below_wrapper(key) if below_wrapper(key) in take.unread else key for key in keys]
    values = [take(key, own[::-1] if is_kernel(path) else own) for key in keys]
    values = [v.T if is_kernel(path) else v for v in values]
    return jnp.asarray(np.stack(values) if stacked else values[0])
