"""Adapters written as PEFT does it.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; the keys are
`base_model.model.<dotted module>.lora_A.weight` (rank, d_in) and `.lora_B.weight`
(d_out, rank), a pair for every single layer; those of experts are (experts·rank, d_in) and
(d_out, rank·experts), those of a convolution (rank, d_in, *window) and (d_out, rank, 1, ...).  Of
an embedding they are `lora_embedding_A` (rank, vocabulary) and `lora_embedding_B` (d, rank); of a
head that is tied to it, the head's pair too.  A bias on B is `.lora_B.bias` (d_out,); a bias of the
base that was trained is `<dotted module>.base_layer.bias` in an adapted layer, and
`<dotted module>.bias` elsewhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # noqa: F401 (the example uses it)
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._files import atomic_directory, atomic_file, write_tensors
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Params
from ..lora import (
    Layouts,
    adapted_param,
    adapter_names,
    is_embedding,
    is_parameter,
    is_saved,
    is_target,
    paths_of_layers,
    pattern_name,
    rule_for,
    target_name,
    tied_config,
    tied_table,
    trained_biases,
)
from ._experts import NESTING, Parameter, keys_as_listed, pack
from ._peft import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    below_wrapper,
    config_to_peft,
    factor_keys,
    module_key,
    tokens_key,
    whole_keys,
)
from ._shapes import check_start, check_window, file_axes, magnitude_shape, to_file
from ._tokens import saved_tokens


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

    The keys of raw parameters (`target_parameters`) do not name them; they are nested in the order
    of `config.target_parameters`, which must be the order in which PEFT's module declares those it
    has.  PEFT's A lies along a parameter's last axis, or along the middle one of experts whose
    module has `is_transposed`: say in the layouts that this axis is contracted.

    PEFT adapts no transposed convolution: one's tensors have a convolution's form, and only this
    library reads them.

    Args:
        directory: Where to; an adapter already there is replaced.
        adapter: As from `init_adapter`.
        config: The config it was made with.
        layouts: The layouts it was made with.
        base_model: Name or path of the base, for the file's `base_model_name_or_path`.

    Raises:
        InputError: if the adapter is not the config's (its modules, ranks, scaling), if a
            part of it cannot be written (a layer without a name, a convolution with groups, an
            embedding whose start moved the base), if its start moved the base as no reader can
            again, or if the disk is full.

    Example:
        >>> import jax, tempfile
        >>> from lora_jax import init_adapter
        >>> from lora_jax.adapters import load_adapter
        >>> base = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"])
        >>> adapter = init_adapter(jax.random.key(0), base, config)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(directory, adapter, config)
        ...     loaded, _ = load_adapter(directory, base)
        >>> bool((loaded["q_proj"]["lora_A"] == adapter["q_proj"]["lora_A"]).all())
        True
    """
    directory, config = Path(directory), tied_config(adapter, config)
    _check_start(config)
    _check_saved_modules(adapter, config)
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in _tensors(adapter, config, layouts):
        if key in tensors:
            raise InputError(
                f"save_adapter: {key} would be there twice: PEFT cannot adapt both a module and"
                " a parameter of it; leave one of the two out"
            )
        tensors[key] = tensor
    if not tensors:
        raise InputError("save_adapter: the adapter is empty; nothing was saved")
    # Sorted as PEFT's are, but for patterns: the first that matches wins.
    fields = dict(sorted(config_to_peft(adapter, config, base_model).items()))
    text = json.dumps(fields, indent=2)

    def write(into: Path) -> None:
        # Both are complete before either takes its place, so that a full disk changes nothing.
        with atomic_file(into / WEIGHTS_FILE) as weights, atomic_file(into / CONFIG_FILE) as file:
            write_tensors(weights, tensors, **(NESTING if config.target_parameters else {}))
            file.write_text(text + "\n")

    if directory.exists():
        write(directory)
    else:
        with atomic_directory(directory) as temporary:
            write(temporary)


def _tensors(
    adapter: Params, config: LoraConfig, layouts: Layouts | None
) -> Iterator[tuple[str, np.ndarray]]:
    leaves = dict(leaves_with_path(adapter))
    keys = _parameter_keys(leaves, config, layouts)
    for path, leaf in leaves.items():
        name = path.rsplit("/", 1)[-1]
        if "lora_" not in name:
            yield from _whole_tensors(path, np.asarray(leaf), leaves, layouts)
        elif name.endswith("lora_A"):
            yield from _pair_tensors(path, leaves, config, layouts, keys)
    for module, rows in saved_tokens(leaves, config).items():
        yield tokens_key(module), rows
    tied = tied_table(adapter)
    if tied and tied.table in leaves:
        yield f"{PREFIX}{tied.head}.weight", np.asarray(leaves[tied.table])


def _parameter_keys(
    leaves: dict[str, Any], config: LoraConfig, layouts: Layouts | None
) -> dict[str, str]:
    """From the name of every single parameter that the config chooses as such to its key."""
    found = []
    for path_a in [path for path in leaves if path.endswith("lora_A")]:
        param = adapted_param(path_a)
        names = paths_of_layers(
            target_name(param), rule_for(layouts, param), np.shape(leaves[path_a])
        )
        found += [Parameter(n, param) for n in names if is_parameter(n, param, config)]
    return keys_as_listed(found, config)


def _pair_tensors(
    path_a: str,
    leaves: dict[str, Any],
    config: LoraConfig,
    layouts: Layouts | None,
    keys: dict[str, str],
) -> Iterator[tuple[str, np.ndarray]]:
    prefix = path_a.removesuffix("lora_A")
    parts = [f"{prefix}lora_{x}" for x in ("A", "B", "scaling")]
    if missing := [part for part in parts if part not in leaves]:
        raise InputError(f"save_adapter: the adapter has {path_a} but no {missing[0]}")
    a, b, scalings = (np.asarray(leaves[part]) for part in parts)
    param = adapted_param(path_a)
    module = target_name(param)
    top = "/" not in module and param == module and module in keys
    if not module or top:
        raise InputError(
            f"{path_a}: a layer without a name cannot be saved in PEFT's format; exclude it"
        )
    if is_embedding(param) and config.moves_base:
        raise InputError(
            f"save_adapter: {param} started with init_lora_weights={config.init_lora_weights!r},"
            " which moves no embedding in PEFT; make the adapter plain by without_start first"
        )
    layout = rule_for(layouts, param)
    if a.ndim != 2 + layout.leading_axes:
        raise InputError(
            f"{path_a} has shape {a.shape}: pass the layouts the adapter was made with"
        )
    check_window("save_adapter", param, a.shape[-2], layout)
    check_start(param, layout, config)
    names = paths_of_layers(module, layout, a.shape)
    lengths = _vectors(f"{prefix}lora_magnitude", leaves, "use_dora", config.use_dora, len(names))
    biases = _vectors(f"{prefix}lora_B_bias", leaves, "lora_bias", config.lora_bias, len(names))
    # (layers, experts, ...), one of each where there is no such axis.
    a, b = (x.reshape(len(names), -1, *x.shape[-2:]) for x in (a, b))
    scalings = scalings.reshape(len(names), -1)
    for i, name in enumerate(names):
        own = pattern_name(name, param, config)
        rank, expected = config.rank(own), config.scaling(own)
        if is_target(name, param, config) != bool(scalings[i].any()):
            has, gives = ("an", "none") if scalings[i].any() else ("no", "one")
            raise InputError(
                f"save_adapter: {name} has {has} adapter, but the config gives it {gives}; pass"
                " the config the adapter was made with"
            )
        if not scalings[i].any():
            continue
        if not np.allclose(scalings[i], expected, rtol=1e-6, atol=0):
            raise InputError(
                f"{prefix}lora_scaling is {scalings[i, 0]:g} at {name}, but the config gives"
                f" {expected:g}; pass the config the adapter was made with, and train through"
                " optim.freeze_base, which leaves the scaling alone"
            )
        if rank > a.shape[-1] or a[i, ..., rank:].any() or b[i, :, rank:].any():
            raise InputError(
                f"save_adapter: {name} has rank {_used_rank(a[i], b[i])}, but the config gives"
                f" {rank}; pass the config the adapter was made with"
            )
        if layout.experts and name not in keys:
            raise InputError(
                f"save_adapter: {name} has experts, which PEFT's format knows only of"
                " target_parameters; name it there"
            )
        key = keys.get(name, module_key(name))
        key_a, key_b = factor_keys(key, param)
        one_a, one_b = to_file(*pack(a[i, ..., :rank], b[i, :, :rank]), layout)
        yield key_a, one_a
        yield key_b, one_b
        if lengths is not None:
            shape = magnitude_shape(lengths[i].size, layout)
            yield f"{key}.lora_magnitude_vector", lengths[i].reshape(shape)
        if biases is not None:
            yield f"{key}.lora_B.bias", biases[i]
        tied = tied_table(tree_from_paths(leaves))
        if tied and param == tied.table:
            key_a, key_b = factor_keys(module_key(tied.head), f"{tied.head}/kernel")
            yield key_a, one_b.T
            yield key_b, one_a.T


def _vectors(
    path: str, leaves: dict[str, Any], field: str, expected: bool, layers: int
) -> np.ndarray | None:
    """A vector for each layer (DoRA's lengths, biases on B), which the config must know of."""
    found = leaves.get(path)
    if (found is not None) != expected:
        module, _, name = path.rpartition("/")
        has = f"no {name}" if found is None else f"a {name}"
        raise InputError(
            f"save_adapter: {module} has {has}, but the config says {field}={expected}; pass the"
            " config the adapter was made with"
        )
    return None if found is None else np.asarray(found).reshape(layers, -1)


def _used_rank(a: np.ndarray, b: np.ndarray) -> int:
    used = np.flatnonzero(a.any(axis=(0, 1)) | b.any(axis=(0, 2)))
    return int(used[-1]) + 1 if len(used) else a.shape[-1]


def _check_start(config: LoraConfig) -> None:
    """Refuse an adapter of a base that no file describes: PEFT would read it for another one."""
    if config.start_can_be_repeated:
        return
    init, way = config.init_lora_weights, "what without_start makes of adapter and config"
    if init == "loftq":
        way = "it by config.with_usual_start(), as an adapter of the quantized base"
    raise InputError(
        f"save_adapter: init_lora_weights={init!r} moved the base in a way that no file tells; save"
        f" {way}"
    )


def _check_saved_modules(adapter: Params, config: LoraConfig) -> None:
    """Whole modules and biases of the adapter are the config's, and the other way round."""
    paths = [path for path, _ in leaves_with_path(adapter)]
    whole = [p for p in paths if "lora_" not in p.rpartition("/")[2]]
    factors = [p for p in paths if p.rpartition("/")[2] == "lora_A"]
    kernels = [p.removesuffix("lora_A") + "kernel" for p in factors]
    biases = trained_biases(whole, config.bias, kernels)
    named = config.modules_to_save or []
    found = {p: [n for n in named if is_saved(p.rpartition("/")[0], n)] for p in whole}
    for path, names in found.items():
        if not names and path not in biases:
            raise InputError(
                f"save_adapter: the adapter holds {path} whole, but the config's modules_to_save"
                f" {config.modules_to_save} and bias={config.bias!r} do not name it; pass the"
                " config it was made with"
            )
    if missing := set(named) - {name for names in found.values() for name in names}:
        raise InputError(
            f"save_adapter: modules_to_save {min(missing)!r} is not in the adapter; pass the config"
            " it was made with"
        )
    if config.bias != "none" and not biases:
        raise InputError(
            f"save_adapter: the config says bias={config.bias!r}, and the adapter holds no bias;"
            " pass the config it was made with"
        )


def _whole_tensors(
    path: str, leaf: np.ndarray, leaves: dict[str, Any], layouts: Layouts | None
) -> Iterator[tuple[str, np.ndarray]]:
    keys, stacked = whole_keys(path, leaf.shape, layouts)
    values = leaf if stacked else leaf[None]
    # PEFT's wrapper of an adapted layer holds the layer, with its bias, as `base_layer`.
    scaling = leaves.get(adapter_names(f"{path.rpartition('/')[0]}/kernel")[2], 0)
    adapted = np.broadcast_to(np.asarray(scaling) != 0, len(keys))
    for key, value, inside in zip(keys, values, adapted, strict=True):
        axes = file_axes(path, value.ndim, rule_for(layouts, path))
        yield below_wrapper(key) if inside else key, value.transpose(axes)
