"""LoRA-GA: adapters that start along the loss's gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._start_options import start_options
from .._typing import Array, Key, Params
from ..lora import (
    Layouts,
    Target,
    as_adapter,
    find_targets,
    fold_in_name,
    layer_matrices,
    split_weights,
    without_delta,
)
from ._watch import mean_gradients, refuse_quantized

_WHERE = "init_lora_ga"


def init_lora_ga(
    loss: Callable[[Params, Any], Array],
    base_params: Params,
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    key: Key | None = None,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Start the adapter so that its first step goes along the gradient of the whole weight.

        dL/dW = U·S·Vᵀ,    A = U_i,    B = c·S_j·V_jᵀ,    W0 = W - scaling·A·B

    The gradient is the mean over batches.  `direction` chooses i and j among the 2r largest
    directions: `ArB2r` i the first r and j the next, `A2rBr` the other way round, `ArBr` i the odd
    and j the even ones, `random` i = j by chance.  `scale` chooses c: `stable`
    ∜d_out/√stable_gamma, `weight_svd` so that B's largest is W's, `gd_scale` 1/scaling (for A
    too), `unit` 1.

    Args:
        loss: `(params, batch)` to the mean loss, a scalar.
        base_params: Dense weights; they stay as they are.
        config: Ranks, targets, and `lora_ga_config`.
        batches: As `loss` takes them.
        key: For the direction `random` alone.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base with its targets moved, and the adapter.  Memory is that of the gradients: one
        float32 for every weight of the targets.

    Raises:
        InputError: if there is no batch, a loss or gradient that is not finite, a target that is
            quantized, twice a rank above its smaller dimension, or a missing key.

    Example:
        >>> import flax.linen as nn
        >>> from lora_jax import combine, lora_linen
        >>> model, x = nn.Sequential([nn.Dense(8)]), jax.random.normal(jax.random.key(0), (20, 4))
        >>> base = model.init(jax.random.key(1), x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="lora_ga")
        >>> def loss(params, batch):
        ...     return jnp.mean(lora_linen(model).apply({"params": params}, batch) ** 2)
        >>> moved, adapter = init_lora_ga(loss, base, config, [x])
        >>> bool(jnp.allclose(loss(combine(moved, adapter), x), loss(base, x), rtol=1e-5))
        True

    Source: Wang et al. 2024, "LoRA-GA", section 3.3; the options as in PEFT.
    """
    options = start_options("lora_ga", config.lora_ga_config, "lora_ga")
    assert options is not None
    if options["direction"] == "random" and key is None:
        raise InputError(f"{_WHERE}: direction 'random' needs a key; give key=jax.random.key(0)")
    targets = find_targets(base_params, config, layouts=layouts)
    refuse_quantized(targets, base_params)
    _check_ranks(targets)
    gradients = mean_gradients(loss, base_params, targets, batches, _WHERE)

    def split(weight: Array, target: Target) -> tuple[Any, Array, Array]:
        grads = layer_matrices(gradients.pop(target.path), target)
        kernels, width = layer_matrices(weight, target), max(target.ranks)
        names = np.repeat(target.names, target.experts or 1)
        ranks, scalings = target.of_matrices(target.ranks), target.of_matrices(target.scalings)
        pairs = []
        for i, (rank, scaling) in enumerate(zip(ranks.tolist(), scalings.tolist(), strict=True)):
            a, b = jnp.zeros((target.d_in, width)), jnp.zeros((width, target.d_out))
            if rank:
                own = None if key is None else _key_of(key, names[i], i, target)
                chosen = _directions(options["direction"], rank, own)
                of_a, of_b = _factors(grads[i], kernels[i], chosen, scaling, options)
                a, b = a.at[:, :rank].set(of_a), b.at[:rank].set(of_b)
            pairs.append((a, b))
        a, b = (jnp.stack(factors) for factors in zip(*pairs, strict=True))
        a, b = as_adapter(a, b, target, config)
        return without_delta(weight, a, b, target, None), a, b

    return split_weights(base_params, config, layouts, split)


def _key_of(key: Key, name: str, number: int, target: Target) -> Key:
    """The key of a layer's name, and of the expert's number where it has several."""
    own = fold_in_name(key, name)
    return own if target.experts is None else jax.random.fold_in(own, number % target.experts)


def _check_ranks(targets: tuple[Target, ...]) -> None:
    for target in targets:
        if 2 * max(target.ranks) > min(target.d_in, target.d_out):
            raise InputError(
                f"{_WHERE}: {target.path}: twice the rank {max(target.ranks)} exceeds the smaller"
                f" side of ({target.d_in}, {target.d_out}); lower r or rank_pattern"
            )


def _directions(direction: str, rank: int, key: Key | None) -> tuple[Array, Array]:
    """Which of the 2·rank largest singular directions go to A, and which to B."""
    all_of_them = jnp.arange(2 * rank)
    if direction == "random":
        assert key is not None
        chosen = jax.random.permutation(key, all_of_them)[:rank]
        return chosen, chosen
    halves = {
        "ArB2r": (all_of_them[:rank], all_of_them[rank:]),
        "A2rBr": (all_of_them[rank:], all_of_them[:rank]),
        "ArBr": (all_of_them[1::2], all_of_them[0::2]),
    }
    return halves[direction]


def _factors(
    gradient: Array,
    kernel: Array,
    chosen: tuple[Array, Array],
    scaling: float,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """A (d_in, rank) and B (rank, d_out) of one layer."""
    u, s, vt = jnp.linalg.svd(gradient, full_matrices=False)
    # Which sign a pair has is chance, and here it moves the base: the largest entry is positive.
    signs = jnp.sign(jnp.take_along_axis(u, jnp.abs(u).argmax(0)[None], 0))[0]
    u, vt = u * signs, vt * signs[:, None]
    of_a, of_b = chosen
    a, b = u[:, of_a], s[of_b][:, None] * vt[of_b]
    if options["scale"] == "stable":
        b = b * (kernel.shape[1] ** 0.25 / options["stable_gamma"] ** 0.5)
    elif options["scale"] == "weight_svd":
        largest = s[of_b][0]
        b = b * jnp.where(largest > 0, jnp.linalg.norm(kernel, 2) / largest, 1.0)
    elif options["scale"] == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b
