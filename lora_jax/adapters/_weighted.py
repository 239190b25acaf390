"""Several adapters made into one, by PEFT's rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._config import LoraConfig
from .._errors import InputError
from .._tree import combine, leaves_with_path, tree_from_paths
from .._typing import Array, Key, Params
from ..lora import (
    DECODERS,
    AdaptedLayer,
    Layouts,
    adapter_from_layers,
    check_bias_target,
    dense_delta,
    fold_in_name,
    is_parameter,
    mark_names,
    nearest_factors,
    single_layers,
    tied_table,
    unit_scaled,
    whole_parameters,
)
from ._rule import CombinationType, MajoritySign, Rule

Pair = tuple[Params, LoraConfig]
Own = Mapping[int, AdaptedLayer]
"""The adapters' own versions of one layer, by the adapters' numbers."""


def weighted_adapter(
    adapters: Sequence[Pair],
    weights: Sequence[float] | Float[Array, "adapters"],
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
    key: Key | None = None,
    layouts: Layouts | None = None,
) -> tuple[dict[str, Any], LoraConfig]:
    """One adapter that stands for a weighted sum: ΔW ≈ Σ wᵢ·scalingᵢ·Aᵢ·Bᵢ.

    | type | what the delta is | rank |
    |---|---|---|
    | `cat` | the sum: factors side by side | sum of the ranks |
    | `svd` | the nearest to the sum | `svd_rank`, or the largest rank |
    | `linear` | (Σ cᵢ·Aᵢ)·(Σ cᵢ·Bᵢ) with cᵢ = √(wᵢ·scalingᵢ) | equal ranks |
    | `magnitude_prune` | `linear`, of the largest entries of each factor | equal ranks |
    | `ties` | that, as the mean of those entries that have the elected sign | equal ranks |
    | `dare_linear`, `dare_ties` | `linear`, `ties`, of entries dropped at random | equal ranks |
    | the last four with `_svd` | the rule applied to deltas in place of factors | as `svd` |

    What is applied to factors mixes Aᵢ with Bⱼ, and depends on how a delta was split into
    factors: prefer `cat` and `svd`. With a single adapter PEFT takes every type for `linear`.
    Biases on B (`lora_bias`) are summed by `cat` and `svd`; other types refuse them, since a bias
    is no product of factors. (PEFT loses them.)
    A weight may be negative. Arrays of adapters and weights may be traced by JAX.

    Args:
        adapters: Pairs of an adapter and its config, as from `load_adapter`. A module that some
            of them do not adapt gets the sum of the others.
        weights: One for each adapter.
        combination_type: A row of the table.
        svd_rank: Rank of the result, for types that end in `svd`.
        density: Share of entries that `ties`, `dare` and `magnitude_prune` keep, in (0, 1].
        majority_sign_method: Whether `ties` elects the sign of the sum (`"total"`) or the more
            frequent one; the sign of entries before they are weighted.
        key: Which entries `dare` drops. Each layer folds in its own name.
        layouts: The layouts the adapters were made with.

    Returns:
        An adapter of scaling 1, in the first one's dtype, and the first one's config with
        alpha = r and the modules of all.

    Raises:
        InputError: for an option that is missing or has no effect, ranks that must be equal and
            are not, adapters of different bases, or modules or biases held in full.

    Example:
        >>> def one(b):
        ...     layer = {"lora_A": jnp.ones((4, 1)), "lora_B": b * jnp.ones((1, 6)),
        ...              "lora_scaling": jnp.float32(2)}
        ...     return {"q": layer}, LoraConfig(r=1, lora_alpha=2, target_modules=["q"])
        >>> adapter, config = weighted_adapter([one(1.0), one(5.0)], [0.5, -0.5], "cat")
        >>> delta = adapter["q"]["lora_A"] @ adapter["q"]["lora_B"]
        >>> bool(jnp.allclose(delta, 0.5 * 2 - 0.5 * 10)), config.r, config.lora_alpha
        (True, 2, 2)

    Source: PEFT's `add_weighted_adapter`; Yadav et al. 2023, "TIES-Merging", section 4; Yu et
    al. 2024, "DARE", section 3.
    """
    rule = Rule(combination_type, density, majority_sign_method)
    _check(adapters, weights, rule, svd_rank, key)
    views = [single_layers(adapter, config, layouts) for adapter, config in adapters]
    ranks = [max(x.rank for layers in view.values() for x in layers) for view in views]
    rank = sum(ranks) if rule.type == "cat" else svd_rank or max(ranks)
    layers = {
        param: [_combine(own, weights, rule, rank, key) for own in _side_by_side(param, views)]
        for param in dict.fromkeys(param for view in views for param in view)
    }
    configs = [config for _, config in adapters]
    if any(config.lora_bias for config in configs):
        layers = {param: _all_biased(param, own) for param, own in layers.items()}
    own = _selection(configs, layers) | _biases(configs)
    config = unit_scaled(dataclasses.replace(configs[0].with_usual_start(), **own), rank)
    marks = _marks(adapters)
    config = dataclasses.replace(
        config,
        ensure_weight_tying=config.ensure_weight_tying
        or tied_table(tree_from_paths(marks)) is not None,
    )
    made = adapter_from_layers(layers, rank, layouts, config.adapter_dtype)
    return combine(made, tree_from_paths(marks)), config


def _marks(adapters: Sequence[Pair]) -> dict[str, Any]:
    """Whether the adapters of an embedding are those of the head that shares it: all or none."""
    trees = [dict(leaves_with_path(adapter)) for adapter, _ in adapters]
    known = [mark for shared in DECODERS for mark in mark_names(shared.table)]
    marks = {name: tree[name] for tree in trees for name in known if name in tree}
    if len(marks) > 1:
        raise InputError(
            "weighted_adapter: some adapters of the embedding act on the head that shares it"
            " (ensure_weight_tying) and some do not; there is no sum of such"
        )
    return marks


def _combine(own: Own, weights: Any, rule: Rule, rank: int, key: Key | None) -> AdaptedLayer:
    """One layer of the result."""
    some = next(iter(own.values()))
    own = {i: layer for i, layer in own.items() if layer.rank}
    if not own:
        return dataclasses.replace(some, scaling=jnp.float32(0))
    w = jnp.stack([jnp.asarray(weights[i], jnp.float32) for i in own])
    if rule.type in ("cat", "svd"):
        a, b = _concatenated(own, w)
        a, b = (a, b) if rule.type == "cat" else nearest_factors(a, b, rank)
    elif rule.type.endswith("_svd"):
        a, b = _truncated(rule(_deltas(own), w, _keys(key, own, "delta")), rank)
    else:
        a, b = _by_factors(own, w, rule, key)
    bias = _bias(own, w, rule)
    return dataclasses.replace(some, lora_A=a, lora_B=b, scaling=jnp.float32(1), lora_B_bias=bias)


def _bias(own: Own, w: Array, rule: Rule) -> Array | None:
    """The weighted sum of the biases on B, which their scalings belong to."""
    given = [(n, x) for n, x in enumerate(own.values()) if x.lora_B_bias is not None]
    if not given:
        return None
    if rule.type not in ("cat", "svd"):
        raise InputError(
            f"weighted_adapter: {rule.type} has no rule for the biases on B (lora_bias) of"
            f" {given[0][1].name}; use cat or svd, which sum them"
        )
    return jnp.stack([w[n] * x.scaling * jnp.asarray(x.lora_B_bias) for n, x in given]).sum(0)


def _all_biased(param: str, own: Sequence[AdaptedLayer]) -> list[AdaptedLayer]:
    """Layers with a bias on B each, as `lora_bias` has it: zero where no adapter had one."""
    check_bias_target(param)
    none = jnp.zeros(own[0].lora_B.shape[-1])
    biases = [none if x.lora_B_bias is None else x.lora_B_bias for x in own]
    return [dataclasses.replace(x, lora_B_bias=bias) for x, bias in zip(own, biases, strict=True)]


def _concatenated(own: Own, w: Array) -> tuple[Array, Array]:
    """Factors side by side: their product is the weighted sum."""
    a = [w[n] * layer.scaling * layer.lora_A for n, layer in enumerate(own.values())]
    return jnp.concatenate(a, axis=1), jnp.concatenate([x.lora_B for x in own.values()], axis=0)


def _deltas(own: Own) -> list[Array]:
    shapes = [(x.lora_A.shape[0], x.lora_B.shape[1]) for x in own.values()]
    return [
        dense_delta(x.lora_A, x.lora_B, x.scaling, shape, (0,))
        for x, shape in zip(own.values(), shapes, strict=True)
    ]


def _truncated(delta: Array, rank: int) -> tuple[Array, Array]:
    u, s, vt = jnp.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank, None] * vt[:rank]


def _by_factors(own: Own, w: Array, rule: Rule, key: Key | None) -> tuple[Array, Array]:
    """The rule applied to all A, and to all B."""
    ranks = [layer.rank for layer in own.values()]
    if len(set(ranks)) > 1:
        name = next(iter(own.values())).name
        raise InputError(
            f"weighted_adapter: {rule.type} adds factors of equal rank, but those of {name} have"
            f" ranks {', '.join(map(str, ranks))}; use cat, or a type that ends in svd"
        )
    both = w * jnp.stack([layer.scaling for layer in own.values()])
    root = jnp.sqrt(jnp.abs(both))
    # The sign goes to A alone: on both sides it would vanish from the product.
    a = rule(
        [x.lora_A for x in own.values()],
        jnp.where(both < 0, -root, root),
        _keys(key, own, "lora_A"),
    )
    return a, rule([x.lora_B for x in own.values()], root, _keys(key, own, "lora_B"))


def _keys(key: Key | None, own: Own, part: str) -> list[Key] | None:
    """A key for each adapter, the same in any stack."""
    if key is None:
        return None
    name = next(iter(own.values())).name
    return [jax.random.fold_in(fold_in_name(key, f"{name}/{part}"), i) for i in own]


def _side_by_side(param: str, views: Sequence[Mapping[str, tuple[AdaptedLayer, ...]]]) -> list[Own]:
    """For every single layer of a parameter, the adapters' own."""
    own = {i: view[param] for i, view in enumerate(views) if param in view}
    shapes = {i: [(x.lora_A.shape[0], x.lora_B.shape[1]) for x in own[i]] for i in own}
    first, *others = shapes
    for i in others:
        if shapes[i] != shapes[first]:
            raise InputError(
                f"weighted_adapter: adapters {first} and {i} differ in the shape of {param}; they"
                " were made for different bases"
            )
    return [dict(zip(own, layer, strict=True)) for layer in zip(*own.values(), strict=True)]


def _selection(configs: Sequence[LoraConfig], layers: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields that choose what any of the configs chooses, and nothing else."""
    listed = [config.target_parameters or [] for config in configs]
    parameters = list(dict.fromkeys(name for names in listed for name in names)) or None
    merged: dict[str, Any] = {"target_parameters": parameters}
    wanted = [config.target_modules for config in configs]
    rest = [
        (c.exclude_modules, c.layers_to_transform, c.layers_pattern, c.modules_to_save)
        for c in configs
    ]
    if all(r == rest[0] for r in rest) and not configs[0].modules_to_save:
        if all(names == wanted[0] for names in wanted):
            return merged
        if all(isinstance(names, list) for names in wanted):
            names = list(dict.fromkeys(n for names in wanted for n in names or []))
            return {**merged, "target_modules": names}
        if all(isinstance(names, str) and names != "all-linear" for names in wanted):
            either = "|".join(dict.fromkeys(f"({names})" for names in wanted))
            return {**merged, "target_modules": either}
    # No pattern says it: every module by its name.
    chosen = {
        x.layer: None
        for param, own in layers.items()
        for x in own
        if x.rank and not any(is_parameter(x.layer, param, config) for config in configs)
    }
    return {
        **merged,
        "target_modules": list(chosen),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }


def _biases(configs: Sequence[LoraConfig]) -> dict[str, Any]:
    """Config fields of biases: on B if any has one; the base's are in no adapter given."""
    return {"bias": "none", "lora_bias": any(config.lora_bias for config in configs)}


def _check(
    adapters: Sequence[Pair], weights: Any, rule: Rule, svd_rank: int | None, key: Key | None
) -> None:
    where = "weighted_adapter"
    if not adapters or len(adapters) != len(weights):
        raise InputError(
            f"{where}: takes one adapter or more and a weight for each, got {len(adapters)}"
            f" adapters and {len(weights)} weights"
        )
    if svd_rank is not None and (svd_rank < 1 or not rule.type.endswith("svd")):
        raise InputError(
            f"{where}: svd_rank is a positive rank, for types that end in svd; got {svd_rank} for"
            f" {rule.type}"
        )
    if rule.is_random and key is None:
        raise InputError(f"{where}: {rule.type} drops at random; give key=jax.random.key(0)")
    for i, (adapter, _) in enumerate(adapters):
        if whole := whole_parameters(adapter):
            raise InputError(
                f"{where}: adapter {i} holds {whole[0]} whole, and without the base there is no"
                " sum of such; split it off with partition"
            )
        if not jax.tree.leaves(adapter):
            raise InputError(f"{where}: adapter {i} is empty; leave it out")
