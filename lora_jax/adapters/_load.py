"""Adapters that this library or PEFT wrote, read and checked against their base."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._config import LoraConfig
from .._errors import InputError
from .._files import open_tensors
from .._hub import local_directory
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Params
from ..lora import (
    Layouts,
    SharedTable,
    Target,
    adapter_names,
    bias_name,
    check_alone,
    check_whole_stacks,
    head_mark,
    init_with_base,
    is_embedding,
    is_parameter,
    is_saved,
    leaf_shape,
    magnitude_name,
    matched_targets,
    rule_for,
    saved_modules,
    shared_table,
    target_name,
    tied_config,
    tied_table,
    token_leaves,
    token_tables,
    trained_biases,
    without_start,
)
from ..quant import QuantizedTensor, config_of, quantize
from ._experts import NESTING, keys_as_found, keys_as_listed, parameters_of, unpack
from ._peft import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    below_wrapper,
    factor_keys,
    module_key,
    read_config,
    tokens_key,
    weights_file,
    whole_keys,
)
from ._reader import Reader
from ._shapes import check_window, factor_shapes, file_axes, from_file, magnitude_shape


def load_adapter(
    directory: str | Path,
    base_params: Params,
    *,
    layouts: Layouts | None = None,
    parameter_order: Sequence[str] | None = None,
) -> tuple[dict[str, Any], LoraConfig]:
    """Read an adapter that this library or PEFT wrote, checked against its base.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`; or, with the extra
            `hub`, the name of a repository that does.
        base_params: The base's parameters, or their shapes.
        layouts: Axes of kernels that are not plain matrices, of stacked layers and of experts.
        parameter_order: Names of a module's adapted raw parameters in the order in which PEFT's
            module declares them.  PEFT's files do not say which is which; where shapes leave a
            doubt, this must.

    Returns:
        (adapter, config): the adapter as `init_adapter` shapes it, in the file's dtype.

    Raises:
        InputError: for a missing or broken file, a pickle, an option that is not supported,
            an adapter that was made for another base, or one whose parameters cannot be told
            apart.

    Example: see `save_adapter`.
    """
    directory = local_directory(directory, (CONFIG_FILE, WEIGHTS_FILE))
    config = _fitting(tied_config(base_params, read_config(directory)), base_params)
    targets = matched_targets(base_params, config, layouts=layouts)
    if not targets:
        fields = ("target_modules", "target_parameters")
        given = [f"{field} {own}" for field in fields if (own := getattr(config, field))]
        raise InputError(
            f"{directory / CONFIG_FILE}: {' and '.join(given) or 'no target_modules'} matches"
            " nothing in this base; the adapter was made for another base"
        )
    params = dict(leaves_with_path(base_params))
    biases = trained_biases(params, config.bias, [target.path for target in targets])
    check_whole_stacks(biases, config, targets)
    if not biases:  # PEFT trains none then, and says so nowhere
        config = dataclasses.replace(config, bias="none")
    with open_tensors(weights_file(directory)) as file:
        take = Reader(file)
        keys = _parameter_keys(take, targets, config, parameter_order)
        leaves: dict[str, Any] = {}
        for target in targets:
            leaves.update(_read_target(target, keys, take, config))
        for path in saved_modules(base_params, config):
            leaves[path] = _read_whole(path, params[path], layouts, take)
        for path in biases:
            if path not in leaves:
                leaves[path] = _read_whole(path, params[path], layouts, take)
        for path, ids in token_tables(base_params, config, layouts).items():
            check_alone(path, leaves)
            shape = (len(ids), leaf_shape(params[path])[0][int(is_embedding(path))])
            leaves |= token_leaves(path, take(tokens_key(target_name(path)), shape), ids)
        leaves |= head_mark(base_params, config, leaves)
        if tied := tied_table(tree_from_paths(leaves)):
            _check_tied_head(tied, leaves, take)
        _drop_copies(take, params, layouts, config)
    take.check(directory / WEIGHTS_FILE)
    dtype = str(leaves[adapter_names(targets[0].path)[0]].dtype)
    adapter, config = tree_from_paths(leaves), dataclasses.replace(config, adapter_dtype=dtype)
    if config.moves_base:
        if table := next((t.path for t in targets if is_embedding(t.path)), None):
            raise InputError(
                f"{directory / CONFIG_FILE}: init_lora_weights={config.init_lora_weights!r} moves"
                f" no embedding in PEFT, and {table} is adapted; convert the adapter where it was"
                " trained (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        return _over_unmoved(directory, base_params, adapter, config, layouts)
    return adapter, config


def _over_unmoved(
    directory: Path, base: Params, adapter: Params, config: LoraConfig, layouts: Layouts | None
) -> tuple[dict[str, Any], LoraConfig]:
    """An adapter over this base, of one that was trained over a base which its start had moved."""
    if not config.start_can_be_repeated:
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
    kept = [n for n in config.modules_to_save or [] if any(is_saved(p, n) for p in paths)]
    return dataclasses.replace(config, modules_to_save=kept or None)


def _parameter_keys(
    take: Reader, targets: Sequence[Target], config: LoraConfig, order: Sequence[str] | None
) -> dict[str, str]:
    """From the name of every single parameter that the config chooses as such to its key."""
    parameters = [
        parameter
        for target in targets
        for parameter in parameters_of(target)
        if is_parameter(parameter.name, target.path, config)
    ]
    if order is None and NESTING.items() <= (take.file.metadata() or {}).items():
        return keys_as_listed(parameters, config)
    return keys_as_found(parameters, take.shape, order)


def _read_target(
    target: Target, keys: Mapping[str, str], take: Reader, config: LoraConfig
) -> Iterator[tuple[str, Any]]:
    """`lora_A`, `lora_B`, `lora_scaling` and more of a target, padded to its largest rank."""
    check_window("load_adapter", target.path, target.d_in, target.layout)
    width, count, pairs, lengths, biases = max(target.ranks), target.experts or 1, [], [], []
    for name, rank in zip(target.names, target.ranks, strict=True):
        a, b = np.zeros((count, target.d_in, 0)), np.zeros((count, 0, target.d_out))
        length, bias = np.ones(count * target.d_out, np.float32), np.zeros(target.d_out)
        if rank:
            key = keys.get(name, module_key(name))
            key_a, key_b = factor_keys(key, target.path)
            shapes = factor_shapes(count * rank, target.d_in, target.d_out, target.layout)
            whole = from_file(take(key_a, shapes[0]), take(key_b, shapes[1]))
            a, b = unpack(*whole, count)
            if config.use_dora:
                shape = magnitude_shape(length.size, target.layout)
                length = take(f"{key}.lora_magnitude_vector", shape)
            if config.lora_bias:
                bias = take(f"{key}.lora_B.bias", bias.shape)
        lengths.append(length.reshape(count, -1))
        biases.append(np.tile(bias, (count, 1)))
        none, pad = (0, 0), (0, width - rank)
        pairs.append((np.pad(a, (none, none, pad)), np.pad(b, (none, pad, none))))
    dtype = next(a.dtype for (a, _), rank in zip(pairs, target.ranks, strict=True) if rank)
    stacks = [np.concatenate([pair[i] for pair in pairs]).astype(dtype) for i in (0, 1)]
    stacks.append(np.asarray(target.of_matrices(target.scalings), np.float32))
    names: tuple[str, ...] = adapter_names(target.path)
    if config.use_dora:
        names = (*names, magnitude_name(target.path))
        stacks.append(np.concatenate(lengths).astype(np.float32))
    if config.lora_bias:
        names = (*names, bias_name(target.path))
        stacks.append(np.concatenate(biases).astype(dtype))
    for path, value in zip(names, stacks, strict=True):
        # `jnp.asarray` would compile a copy for every shape.
        yield path, jax.device_put(value.reshape((*target.lead, *value.shape[1:])))


def _check_tied_head(tied: SharedTable, leaves: dict[str, Any], take: Reader) -> None:
    """Read what the file says of the head, which must be what the embedding has."""
    table, head = tied.table, tied.head
    if table in leaves:
        pairs = [(f"{PREFIX}{head}.weight", leaves[table])]
    else:
        a, b = (leaves[name] for name in adapter_names(table)[:2])
        pairs = list(zip(factor_keys(module_key(head), f"{head}/kernel"), (b, a), strict=True))
    for key, value in pairs:
        fits = take.shape(key) == value.shape
        if not np.array_equal(take(key, value.shape), value) and fits:
            take.foreign.append(
                f"{key} is not what the embedding has, though the config says ensure_weight_tying;"
                " give the base as a checkpoint with tie_word_embeddings false and an"
                " lm_head.weight"
            )


def _drop_copies(
    take: Reader, params: dict[str, Any], layouts: Layouts | None, config: LoraConfig
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
    shared = shared_table(tree_from_paths(params))
    for path, leaf in params.items():
        keys, stacked = whole_keys(path, leaf_shape(leaf)[0], layouts)
        if shared and path == shared.table:
            keys.append(f"{PREFIX}{shared.head}.weight")
        for i, key in enumerate(keys):
            if key not in bare:
                continue
            value = take.file.get_tensor(bare[key])
            own = _own_axes(path, value, layouts)
            if not _equals(own, leaf, i if stacked else None):
                take.foreign.append(
                    f"{bare[key]} {value.shape} is a weight of the base, and not this base's {path}"
                )
            take.unread.remove(bare[key])


def _own_axes(path: str, value: np.ndarray, layouts: Layouts | None) -> np.ndarray:
    """A file's weight in the order of axes that it has here."""
    return value.transpose(np.argsort(file_axes(path, value.ndim, rule_for(layouts, path))))


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


def _read_whole(path: str, leaf: Any, layouts: Layouts | None, take: Reader) -> Any:
    shape, _ = leaf_shape(leaf)
    keys, stacked = whole_keys(path, shape, layouts)
    own = shape[1:] if stacked else shape
    # An adapted layer's bias lies below PEFT's wrapper.
    keys = [below_wrapper(key) if below_wrapper(key) in take.unread else key for key in keys]
    shape = tuple(own[axis] for axis in file_axes(path, len(own), rule_for(layouts, path)))
    values = [_own_axes(path, take(key, shape), layouts) for key in keys]
    return jnp.asarray(np.stack(values) if stacked else values[0])
