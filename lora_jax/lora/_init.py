"""Fresh adapters, and the dropout they train with."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._config import LoraConfig
from .._errors import InputError
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Array, Key, Params
from ..quant import QuantizedTensor, dequantize
from ._biases import check_bias_target, check_biases, trained_biases
from ._dora import column_norm
from ._layout import Layouts, as_matrix
from ._targets import (
    Target,
    adapter_names,
    bias_name,
    find_targets,
    is_embedding,
    magnitude_name,
    saved_modules,
)
from ._tied import head_mark
from ._tokens import check_alone, first_tokens, token_tables


def init_adapter(
    key: Key, base_params: Params, config: LoraConfig, *, layouts: Layouts | None = None
) -> dict[str, Any]:
    """A new adapter for `base_params`, which stay as they are.

    Args:
        key: Random key; each layer folds in its own name, so an adapter does not change when
            other targets are added.
        base_params: The base's parameters: arrays, quantized tensors, or only their shapes.
        config: Ranks, targets, initialisation.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        A nested dict over the adapted modules: `lora_A (d_in, rank)`, `lora_B (rank, d_out)`
        in `config.adapter_dtype`, `lora_scaling ()` in float32, under DoRA `lora_magnitude
        (d_out,)`, under `lora_bias` `lora_B_bias (d_out,)`, each with leading axes of layers and of
        experts where the base has them.  The names beside a raw parameter `w` are `w_lora_A`, ...
        Layers of smaller rank are padded with zeros, which stay zero in training; a layer without
        an adapter has scaling 0.  Modules of `modules_to_save` and biases that `bias` names are
        copied in full.  Of an embedding with `trainable_token_indices` there are the rows,
        `embedding_lora_tokens (n, d)`, and `embedding_lora_token_ids (n,)`; one that the output
        head shares has a mark that says whether its adapter is the head's too
        (`ensure_weight_tying`).

    Raises:
        InputError: if a name or pattern of the config matches nothing, if a rank exceeds a
            target's smaller side, if `modules_to_save`, `trainable_token_indices`, `bias` or
            `lora_bias` asks for what cannot be kept apart or copied, or if the config's start
            moves the base.

    Example:
        >>> base = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"])
        >>> adapter = init_adapter(jax.random.key(0), base, config)
        >>> jax.tree.map(jnp.shape, adapter)
        {'q_proj': {'lora_A': (4, 2), 'lora_B': (2, 6), 'lora_scaling': ()}}

    Source: Hu et al. 2021, section 4.1; defaults as in PEFT (A kaiming-uniform with a = √5,
    which is U(±1/√d_in), B zero; for an embedding A zero, B normal).
    """
    refuse_data_starts("init_adapter", config)
    if config.moves_base:
        raise InputError(
            f"init_adapter: init_lora_weights={config.init_lora_weights!r} moves the base too; call"
            " init_with_base, which returns both"
        )
    for target in find_targets(base_params, config, layouts=layouts):
        _check_ranks(target)
    return fresh_adapter(key, base_params, config, layouts)


def refuse_data_starts(where: str, config: LoraConfig) -> None:
    """Refuse a config whose start looks at data, where none is given."""
    if config.starts_from_data:
        init = config.init_lora_weights
        raise InputError(
            f"{where}: init_lora_weights={init!r} looks at batches of data; call"
            f" adapters.init_{init}"
        )


def fresh_adapter(
    key: Key, base_params: Params, config: LoraConfig, layouts: Layouts | None
) -> dict[str, Any]:
    """As `init_adapter`, whose factors any start may then replace."""
    dtype = jnp.dtype(config.adapter_dtype)
    params = dict(leaves_with_path(base_params))
    leaves: dict[str, Any] = {}
    targets = find_targets(base_params, config, layouts=layouts)
    for target in targets:
        a, b = _factors(key, target, config)
        scaling = np.asarray(target.of_matrices(target.scalings), np.float32).reshape(target.lead)
        values = (a.astype(dtype), b.astype(dtype), jax.device_put(scaling))
        leaves.update(zip(adapter_names(target.path), values, strict=True))
        if config.use_dora:
            leaves[magnitude_name(target.path)] = magnitudes(params[target.path], target, *values)
        if config.lora_bias:
            check_bias_target(target.path)
            leaves[bias_name(target.path)] = _biases_on_b(key, target, config).astype(dtype)
    if config.modules_to_save:
        for path in saved_modules(base_params, config):
            leaves[path] = _trainable_copy(path, params[path], dtype, "modules_to_save copies")
    biases = trained_biases(params, config.bias, [target.path for target in targets])
    check_biases(biases, config, targets)
    for path in biases:
        leaves[path] = _trainable_copy(path, params[path], dtype, f"bias={config.bias!r} copies")
    for path, ids in token_tables(base_params, config, layouts).items():
        check_alone(path, leaves)
        _check_values(path, params[path], "trainable_token_indices copies rows of")
        leaves |= first_tokens(path, params[path], ids, dtype)
    leaves |= head_mark(base_params, config, leaves)
    return tree_from_paths(leaves)


def magnitudes(weight: Any, target: Target, a: Array, b: Array, scaling: Array) -> Array:
    """‖W0 + scaling·A·B‖ of every column of a target, float32, one layer at a time."""
    _check_values(target.path, weight, "use_dora measures")
    return _norms(target.layout.contracting or (0,), len(target.lead), (weight, a, b, scaling))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norms(
    contracting: tuple[int, ...], lead: int, parts: tuple[Any, Array, Array, Array]
) -> Array:
    def of_layer(parts: Any) -> Array:
        kernel, *factors = parts
        if not isinstance(kernel, QuantizedTensor) or kernel.contracting != contracting:
            kernel = as_matrix(meta.unbox(kernel), contracting)
        return column_norm(kernel, *factors)

    of_all = of_layer
    for _ in range(lead):
        of_all = functools.partial(jax.lax.map, of_all)
    return of_all(parts)


def with_dropout(key: Key, adapter: Params, rate: float) -> dict[str, Any]:
    """The adapter with dropout switched on for one step; `key` must be new in each.

    The key and the rate become leaves beside each `lora_A` (stacked like it), so they reach
    the layers through `nn.scan` and `nn.jit` as the weights do.  Add them inside the function
    that is differentiated; at rate 0 the adapter comes back unchanged.

    Args:
        key: Random key.
        adapter: As from `init_adapter`.
        rate: Share of the adapter's inputs that is zeroed, in [0, 1).

    Raises:
        InputError: if the rate is out of its range.

    Example:
        >>> adapter = {"q_proj": {"lora_A": jnp.zeros((4, 2))}}
        >>> sorted(with_dropout(jax.random.key(0), adapter, 0.1)["q_proj"])
        ['lora_A', 'lora_dropout_key', 'lora_dropout_rate']
    """
    if not 0.0 <= rate < 1.0:
        raise InputError(f"with_dropout: rate must be in [0, 1), got {rate!r}")
    leaves = dict(leaves_with_path(adapter))
    if not rate:
        return tree_from_paths(leaves)
    for path, a in list(leaves.items()):
        if path.endswith("lora_A"):
            stack, own = a.shape[:-2], fold_in_name(key, path)
            prefix = path.removesuffix("lora_A")
            leaves[f"{prefix}lora_dropout_key"] = jax.random.split(own, stack) if stack else own
            leaves[f"{prefix}lora_dropout_rate"] = jnp.full(stack, rate, jnp.float32)
    return tree_from_paths(leaves)


def fold_in_name(key: Key, name: str) -> Key:
    """A key for one name, whatever other names there are."""
    return jax.random.fold_in(key, _number_of(name))


def _number_of(name: str) -> np.uint32:
    return np.uint32(zlib.crc32(name.encode()))


def _factors(key: Key, target: Target, config: LoraConfig) -> tuple[Array, Array]:
    """A (*lead, d_in, rank) and B (*lead, rank, d_out), padded to the largest rank."""
    width, pairs, order = max(target.ranks), [], []
    for rank in sorted(set(target.ranks)):
        layers = [i for i, own in enumerate(target.ranks) if own == rank]
        a, b = _of_layers(key, [target.names[i] for i in layers], target, rank, config)
        if rank < width:
            none, pad = (0, 0), (0, width - rank)
            a, b = jnp.pad(a, (none, none, none, pad)), jnp.pad(b, (none, none, pad, none))
        pairs.append((a, b))
        order += layers
    (a, b), *others = pairs
    if others:
        back = np.argsort(order)
        a, b = (jnp.concatenate(factors)[back] for factors in zip(*pairs, strict=True))
    return a.reshape(*target.lead, *a.shape[2:]), b.reshape(*target.lead, *b.shape[2:])


def _of_layers(
    key: Key, names: list[str], target: Target, rank: int, config: LoraConfig
) -> tuple[Array, Array]:
    """The factors of layers of one rank, (layers, experts, d_in, rank) and (..., rank, d_out)."""
    init, experts = config.init_lora_weights, target.experts
    shape_a, shape_b = (target.d_in, rank), (rank, target.d_out)
    lead = (len(names), experts or 1)
    if not rank:
        return jnp.zeros((*lead, *shape_a)), jnp.zeros((*lead, *shape_b))
    numbers = np.array([_number_of(name) for name in names])
    if init == "orthogonal" and not is_embedding(target.path):
        return _orthogonal(_keys(key, numbers, experts, 3), shape_a, shape_b)
    keys_a, keys_b = _keys(key, numbers, experts, 2)
    if is_embedding(target.path):
        a = jnp.zeros((*lead, *shape_a)) if init else _normal(keys_a, shape_a)
        return a, _normal(keys_b, shape_b)
    a = (
        _normal(keys_a, shape_a) / rank
        if init == "gaussian"
        else _uniform(keys_a, shape_a, target.d_in**-0.5)
    )
    if init:
        return a, jnp.zeros((*lead, *shape_b))
    # PEFT's B of all experts is one layer, with as many inputs.
    return a, _uniform(keys_b, shape_b, (rank * (experts or 1)) ** -0.5)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _keys(key: Key, numbers: Array, experts: int | None, parts: int) -> list[Key]:
    """So many keys (layers, experts) of matrices: of a layer's number, and there of an expert's."""

    def of_layer(number: Array) -> Key:
        own = jax.random.fold_in(key, number)
        keys = own[None] if experts is None else jax.random.split(own, experts)
        return jax.vmap(functools.partial(jax.random.split, num=parts))(keys)

    keys = jax.vmap(of_layer)(numbers)
    return [keys[:, :, i] for i in range(parts)]


# Each kind of factor is a program of its own, which all targets share that have its shape: most of
# the time of a start goes into compiling these.
def _each(draw: Callable[..., Any], *keys: Key) -> Any:
    # In turn: some generators draw other numbers for several keys at once.
    of_layer = functools.partial(jax.lax.map, lambda own: draw(*own))
    return jax.lax.map(of_layer, keys)


@functools.partial(jax.jit, static_argnums=1)
def _normal(keys: Key, shape: tuple[int, ...]) -> Array:
    return _each(lambda key: jax.random.normal(key, shape), keys)


@functools.partial(jax.jit, static_argnums=1)
def _uniform(keys: Key, shape: tuple[int, ...], bound: Array | float) -> Array:
    """Numbers within ±bound."""
    return _each(lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound), keys)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _orthogonal(
    keys: list[Key], shape_a: tuple[int, int], shape_b: tuple[int, int]
) -> tuple[Array, Array]:
    """A from the even rows of an orthogonal matrix, B from the odd ones, so that A·B = 0.

    Source: PEFT's `init_lora_weights="orthogonal"`, and its factor of a tenth.
    """
    (d_in, rank), (_, d_out) = shape_a, shape_b

    def draw(key_q: Key, key_a: Key, key_b: Key) -> Any:
        q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
        a = jax.random.normal(key_a, (d_in, rank // 2)) @ q[0::2]
        b = q[1::2].T @ jax.random.normal(key_b, (rank // 2, d_out))
        return a / 10, b / 10

    return _each(draw, *keys)


def _biases_on_b(key: Key, target: Target, config: LoraConfig) -> Array:
    """(*lead, d_out): zero, or as the rest of B where that starts at random; 0 without adapter."""
    count, biases = target.experts or 1, []
    shape = (count, target.d_out)
    for name, rank in zip(target.names, target.ranks, strict=True):
        own = fold_in_name(key, f"{name}/lora_B_bias")
        random = rank and not config.init_lora_weights
        bound = (rank * count) ** -0.5 if random else 0.0
        biases.append(_uniform(own[None, None], shape, bound)[0, 0] if random else jnp.zeros(shape))
    return jnp.concatenate(biases).reshape(*target.lead, -1)


def _check_ranks(target: Target) -> None:
    """Refuse more directions than a matrix has; a file may still hold them."""
    most = min(target.d_in, target.d_out)
    for name, rank in zip(target.names, target.ranks, strict=True):
        if rank > most:
            raise InputError(
                f"lora: rank {rank} at {name} exceeds the smaller side of its {target.d_in} to"
                f" {target.d_out}; a rank above {most} adds parameters and no directions: lower r,"
                " or set this module's in rank_pattern"
            )


def _check_values(path: str, leaf: Any, what: str) -> None:
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf)):
        raise InputError(
            f"{path}: {what} the base's values, and only their shapes are given; call init_adapter"
            " under jax.eval_shape, with the base as an argument"
        )


def _trainable_copy(path: str, leaf: Any, dtype: Any, what: str) -> Array:
    _check_values(path, leaf, what)
    if isinstance(leaf, QuantizedTensor):
        return dequantize(leaf, dtype)
    return jnp.array(meta.unbox(leaf), dtype=dtype)
