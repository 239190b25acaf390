"""EVA: adapters that start from the directions in which their inputs vary."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._start_options import start_options
from .._tree import combine, tree_from_paths
from .._typing import Array, Params
from ..lora import Layouts, Target, adapter_names, find_targets, fresh_adapter
from ._watch import Forward, check_seen, input_moments

_WHERE = "init_eva"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The largest principal components of one layer's inputs."""

    name: str
    rank: int
    """As the config has it, before ranks are dealt out."""
    group: int
    """Layers with the same input have the same number."""
    components: np.ndarray
    """(count, d_in), orthonormal."""
    singular: np.ndarray
    """(count,) singular values of the centred inputs."""
    shares: np.ndarray
    """(count,) shares of the inputs' variance."""


def init_eva(
    forward: Forward,
    base_params: Params,
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any], LoraConfig]:
    """Start A from the main directions of each layer's inputs, ranks going where they tell most.

        X - mean(X) = U·S·Vᵀ,    A = V_r,    B = 0

    Each direction competes by its share S²/ΣS² of its layer's variance; the sum of all ranks
    stays as it is, none exceeds `rho` times its own, and layers left without one are dropped.
    Layers with `adjust_scaling_factors` keep their scaling: alpha changes with the rank.

    Batches are taken until all chosen directions have turned by less than `tau` (a cosine) at the
    last one, or there are no more.  Tokens count where `attention_mask` and `segment_ids` of
    a batch are not 0, and under `use_label_mask` where `labels` are not `label_mask_value` and
    `loss_mask` is true; batches without them count whole.

    Args:
        forward: `(params, batch)` to any output of the model, applied by `lora_linen(module)` or
            by itself; what is watched are its Dense, DenseGeneral and Einsum layers.
        base_params: Dense or quantized; they stay as they are.
        config: Ranks, targets, and `eva_config`.
        batches: As `forward` takes them: dicts, or any trees of arrays.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base, the adapter, and the config with its ranks and alphas.  Memory is that of the
        inputs' second moments: (d_in + 1)² float32 for every layer.

    Raises:
        InputError: if there is no batch, no token that counts, fewer of them than directions, an
            input that is not finite, or a target that cannot be watched.

    Example:
        >>> import flax.linen as nn
        >>> from lora_jax import lora_linen
        >>> model, key = nn.Sequential([nn.Dense(8), jnp.sin, nn.Dense(3)]), jax.random.key(0)
        >>> x = jax.random.normal(key, (20, 4)) * jnp.array([9, 0.1, 0.1, 0.1])
        >>> base = model.init(key, x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva")
        >>> def forward(params, batch):
        ...     return lora_linen(model).apply({"params": params}, batch)
        >>> base, adapter, config = init_eva(forward, base, config, [x])
        >>> config.rank_pattern     # the first layer's inputs lie along a line
        {'layers_0': 1, 'layers_2': 3}

    Source: Paischer et al. 2024, "One Initialization to Rule them All", algorithm 1; PEFT's
    centred inputs.
    """
    options = start_options("eva", config.eva_config, "eva")
    assert options is not None
    if config.target_parameters:
        raise InputError(
            f"{_WHERE}: ranks are dealt out to modules, and target_parameters names none; name"
            " them in target_modules"
        )
    targets = find_targets(base_params, config, layouts=layouts)
    _check_ranks(targets)
    layers = _converged(forward, base_params, targets, batches, options)
    ranks = _deal_out(layers, sum(layer.rank for layer in layers))
    config = _with_ranks(config, layers, ranks, options)
    factors = _factors(targets, layers, ranks, config, options["whiten"])
    fresh = fresh_adapter(jax.random.key(0), base_params, config, layouts)
    return base_params, combine(fresh, tree_from_paths(factors)), config


def _check_ranks(targets: tuple[Target, ...]) -> None:
    for target in targets:
        if max(target.ranks) > target.d_in:
            raise InputError(
                f"{_WHERE}: {target.path}: rank {max(target.ranks)} exceeds the {target.d_in}"
                " numbers of an input; lower r or rank_pattern"
            )


def _converged(
    forward: Forward,
    base_params: Params,
    targets: tuple[Target, ...],
    batches: Iterable[Any],
    options: Mapping[str, Any],
) -> list[_Layer]:
    """The layers' components, once another batch turns none that is chosen, or at the last."""
    by_path = {target.path: target for target in targets}

    def mask_of(batch: Any) -> Array | None:
        return token_mask(batch, options["label_mask_value"] if options["use_label_mask"] else None)

    moments: dict[str, np.ndarray] = {}
    before: dict[str, _Layer] = {}
    for moments in input_moments(forward, base_params, targets, batches, mask_of, where=_WHERE):
        if options["tau"] >= 1 or not all(x[..., -1, -1].all() for x in moments.values()):
            continue
        layers = _layers(by_path, moments, options["rho"])
        if before and _have_settled(layers, before, options["tau"]):
            break
        before = {layer.name: layer for layer in layers}
    check_seen(moments, _WHERE)
    layers = _layers(by_path, moments, options["rho"])
    _check_samples(moments, layers)
    return layers


def _have_settled(layers: list[_Layer], before: Mapping[str, _Layer], tau: float) -> bool:
    ranks = _deal_out(layers, sum(layer.rank for layer in layers))
    cosines = [
        np.sum(layer.components * before[layer.name].components, axis=1)[: ranks[layer.name]]
        for layer in layers
    ]
    return all((np.abs(cosine) >= tau).all() for cosine in cosines)


def _layers(
    targets: Mapping[str, Target], moments: Mapping[str, np.ndarray], rho: float
) -> list[_Layer]:
    """Every adapted layer with as many components as it may have ranks, in the order of use."""
    seen = [
        (targets[path].names[i], targets[path].ranks[i], own)
        for path, stack in moments.items()
        for i, own in enumerate(stack)
        if targets[path].ranks[i]
    ]
    first: dict[bytes, int] = {}
    groups = [first.setdefault(own.tobytes(), len(first)) for _, _, own in seen]
    # Of layers with one input, the largest rank says how many directions all may have.
    largest = {
        g: max(r for (_, r, _), h in zip(seen, groups, strict=True) if h == g) for g in groups
    }
    known: dict[int, tuple[np.ndarray, ...]] = {}
    for (_, _, own), group in zip(seen, groups, strict=True):
        if group not in known:
            count = min(round(largest[group] * rho), len(own) - 1)
            known[group] = _principal_components(own.astype(np.float64), count)
    return [
        _Layer(name, rank, group, *known[group])
        for (name, rank, _), group in zip(seen, groups, strict=True)
    ]


def _principal_components(moments: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Components, singular values and shares of variance, from Σ [x 1]ᵀ·[x 1]."""
    total, samples = moments[:-1, -1], moments[-1, -1]
    scatter = moments[:-1, :-1] - np.outer(total, total) / samples
    values, vectors = _largest(scatter, count)
    values = np.maximum(values, 0.0)
    # Which of the two signs a vector has is chance; the largest entry is positive here.
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    variance = max(np.trace(scatter), np.finfo(np.float32).tiny)
    return vectors.T, np.sqrt(values), values / variance


def _largest(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors."""
    import scipy.sparse.linalg

    if 8 * count < len(matrix) and len(matrix) > 256:
        try:
            start = np.ones(len(matrix))
            values, vectors = scipy.sparse.linalg.eigsh(matrix, count, v0=start)
            order = np.argsort(-values, kind="stable")
            return values[order], vectors[:, order]
        except scipy.sparse.linalg.ArpackError:
            pass  # fewer directions than asked for
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:count], vectors[:, ::-1][:, :count]


def _check_samples(moments: Mapping[str, np.ndarray], layers: list[_Layer]) -> None:
    samples = min(int(x[..., -1, -1].min()) for x in moments.values())
    layer = max(layers, key=lambda layer: len(layer.shares))
    if samples < len(layer.shares):
        raise InputError(
            f"{_WHERE}: {layer.name} may have rank {len(layer.shares)}, more than the {samples}"
            " tokens that count; give more batches, or lower r, rank_pattern or rho"
        )


def _deal_out(layers: list[_Layer], budget: int) -> dict[str, int]:
    """The rank of every layer: how many of its shares are among the largest of all."""
    ranks = dict.fromkeys((layer.name for layer in layers), 0)
    # Equal shares of layers with one input go to the first such layer first, as in PEFT.
    firsts = {layer.group: layer.name for layer in reversed(layers)}
    in_order = sorted(layers, key=lambda layer: firsts[layer.group] != layer.name)
    names = [layer.name for layer in in_order for _ in layer.shares]
    shares = np.concatenate([layer.shares for layer in in_order])
    for i in np.argsort(-shares, kind="stable")[:budget]:
        ranks[names[i]] += 1
    return ranks


def _with_ranks(
    config: LoraConfig, layers: list[_Layer], ranks: Mapping[str, int], options: Mapping[str, Any]
) -> LoraConfig:
    """The config that says these ranks and the alphas that go with them."""
    kept = [layer for layer in layers if ranks[layer.name]]
    alphas = {
        layer.name: config.alpha(layer.name)
        * (ranks[layer.name] / layer.rank if options["adjust_scaling_factors"] else 1)
        for layer in kept
    }
    fields: dict[str, Any] = {}
    if len(kept) < len(layers):
        fields = {
            "target_modules": [_dotted(layer.name) for layer in kept],
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    return dataclasses.replace(
        config,
        rank_pattern=_pattern({layer.name: ranks[layer.name] for layer in kept}, config.r),
        alpha_pattern=_pattern(alphas, config.lora_alpha),
        init_lora_weights="eva",
        eva_config=dict(options),
        **fields,
    )


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Names to values other than the default.

    A name also matches at the end of a longer one, which therefore comes first, and is there even
    at the default.
    """
    longest_first = sorted(values, key=lambda name: -name.count("/"))
    changed = [name for name in longest_first if values[name] != default]
    return {
        _dotted(name): values[name]
        for name in longest_first
        if values[name] != default or any(name.endswith(f"/{other}") for other in changed)
    }


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _factors(
    targets: tuple[Target, ...],
    layers: list[_Layer],
    ranks: Mapping[str, int],
    config: LoraConfig,
    whiten: bool,
) -> dict[str, Array]:
    """`lora_A` and `lora_B` of every target that is left, by path."""
    dtype = jnp.dtype(config.adapter_dtype)
    known = {layer.name: layer for layer in layers}
    factors: dict[str, Array] = {}
    for target in targets:
        width = max(ranks.get(name, 0) for name in target.names)
        if not width:
            continue
        a = np.zeros((len(target.names), target.d_in, width))
        for i, name in enumerate(target.names):
            if rank := ranks.get(name, 0):
                rows, singular = known[name].components[:rank], known[name].singular[:rank]
                a[i, :, :rank] = (rows / np.sqrt(singular)[:, None] if whiten else rows).T
        b = np.zeros((len(target.names), width, target.d_out))
        name_a, name_b, _ = adapter_names(target.path)
        own = slice(None) if target.stacked else 0
        factors |= {name_a: jnp.asarray(a[own], dtype), name_b: jnp.asarray(b[own], dtype)}
    return factors


def token_mask(batch: Any, label_mask_value: int | None) -> Array | None:
    """Which tokens of a batch count: no padding, and of labels those that are trained on.

    Args:
        batch: A mapping that may hold `attention_mask`, `segment_ids`, `labels`, `loss_mask`.
        label_mask_value: What `labels` are where they do not count; None counts all.

    Example:
        >>> token_mask({"attention_mask": jnp.ones((1, 2)), "labels": jnp.array([[-100, 5]])}, -100)
        Array([[False,  True]], dtype=bool)
    """
    if not isinstance(batch, Mapping):
        return None
    masks = [batch[name] != 0 for name in ("attention_mask", "segment_ids") if name in batch]
    if label_mask_value is not None:
        masks += [batch["labels"] != label_mask_value] if "labels" in batch else []
        masks += [batch["loss_mask"] != 0] if "loss_mask" in batch else []
    masks = [jnp.asarray(mask) for mask in masks]
    return None if not masks else jnp.stack(masks).all(axis=0)
