"""CorDA: adapters that start from the weights as their inputs weigh them."""

import collections
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._start_options import start_options
from .._typing import Array, Params
from ..lora import (
    Layouts,
    Target,
    as_adapter,
    check_rank,
    find_targets,
    layer_matrices,
    split_weights,
    without_delta,
)
from ._eva import token_mask
from ._watch import Forward, check_seen, input_moments, refuse_quantized

_WHERE = "init_corda"


def init_corda(
    forward: Forward,
    base_params: Params,
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Give the adapter the directions of each weight that its inputs use most, or least.

        C = mean XᵀX / max(X)² over batches, damped,    C·W = U·S·Vᵀ,
        A = C⁻¹·U_r·√(S_r/scaling),    B = √(S_r/scaling)·V_rᵀ,    W0 = W - scaling·A·B

    with the r largest singular values (`ipm`), to learn what the batches hold, or the r
    smallest (`kpm`), to leave what they hold as it is.  Tokens count where `attention_mask` and
    `segment_ids` of a batch are not 0.

    Args:
        forward: `(params, batch)` to any output of the model, applied by `lora_linen(module)` or
            by itself; what is watched are its Dense, DenseGeneral and Einsum layers.
        base_params: Dense weights; they stay as they are.
        config: Ranks, targets, and `corda_config`.
        batches: As `forward` takes them; PEFT's are single sequences.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base with its targets moved, and the adapter.  Memory is that of the covariances:
        d_in² float32 for every layer.

    Raises:
        InputError: if there is no batch, no token that counts, an input that is not finite, a
            target that cannot be watched or is quantized, or too large a rank.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> from lora_jax import combine, lora_linen
        >>> model, x = nn.Sequential([nn.Dense(8)]), jax.random.normal(jax.random.key(0), (20, 4))
        >>> base = model.init(jax.random.key(1), x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="corda")
        >>> def forward(params, batch):
        ...     return lora_linen(model).apply({"params": params}, batch)
        >>> moved, adapter = init_corda(forward, base, config, [x])
        >>> y = forward(combine(moved, adapter), x)
        >>> bool(jnp.allclose(y, forward(base, x), atol=1e-5))
        True

    Source: Yang et al. 2024, "CorDA", equations 1 to 5; normalised and damped as in PEFT.
    """
    options = start_options("corda", config.corda_config, "corda")
    assert options is not None
    targets = find_targets(base_params, config, layouts=layouts)
    refuse_quantized(targets, base_params)
    for target in targets:
        check_rank(target)
    sums = input_moments(
        forward,
        base_params,
        targets,
        batches,
        lambda batch: token_mask(batch, None),
        scaled=True,
        where=_WHERE,
    )
    (moments,) = collections.deque(sums, maxlen=1)  # the last: there is one, or an error
    check_seen(moments, _WHERE)
    first = options["corda_method"] == "ipm"

    def split(weight: Array, target: Target) -> tuple[Any, Array, Array]:
        own = moments.pop(target.path)
        covariances = own[:, :-1, :-1] / own[:, -1:, -1:]
        pairs = [
            _padded(*_factors(kernel, covariance, rank, scaling, first), max(target.ranks))
            for kernel, covariance, rank, scaling in zip(
                layer_matrices(weight, target),
                covariances,
                target.ranks,
                target.scalings,
                strict=True,
            )
        ]
        a, b = (jnp.stack(factors) for factors in zip(*pairs, strict=True))
        a, b = as_adapter(a, b, target, config)
        return without_delta(weight, a, b, target, None), a, b

    return split_weights(base_params, config, layouts, split)


def _factors(
    kernel: Array, covariance: np.ndarray, rank: int, scaling: float, first: bool
) -> tuple[Array, Array]:
    """A (d_in, rank) and B (rank, d_out) of one layer."""
    if not rank:
        return jnp.zeros((kernel.shape[0], 0)), jnp.zeros((0, kernel.shape[1]))
    damped, inverse = _damped(covariance)
    u, s, vt = jnp.linalg.svd(jnp.matmul(damped, kernel, precision="highest"), full_matrices=False)
    chosen = slice(rank) if first else slice(len(s) - rank, len(s))
    root = jnp.sqrt(s[chosen] / scaling)
    return jnp.matmul(inverse, u[:, chosen], precision="highest") * root, root[:, None] * vt[chosen]


def _damped(covariance: np.ndarray) -> tuple[Array, Array]:
    """The covariance with as much added to its diagonal as makes its inverse one, and that."""
    identity = jnp.eye(len(covariance))
    damp = 0.01
    while damp < 1e6:
        damped = jnp.asarray(covariance) + damp * np.diag(covariance).mean() * identity
        inverse = jnp.linalg.inv(damped)
        if jnp.linalg.norm(jnp.matmul(damped, inverse, precision="highest") - identity) < 0.05:
            return damped, inverse
        damp *= 2
    raise InputError(f"{_WHERE}: the inputs of a layer are all zero; look at the batches")


def _padded(a: Array, b: Array, width: int) -> tuple[Array, Array]:
    more = width - a.shape[1]
    return jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), (0, 0)))
