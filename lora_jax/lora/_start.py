"""The start that a config names, and plain adapters from those whose start moved the base."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from .._config import LoraConfig
from .._errors import InputError
from .._quant_config import QuantConfig
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Array, Key, Params
from ._init import init_adapter, refuse_data_starts
from ._init_svd import init_loftq, init_olora, init_pissa
from ._layout import Layouts


def init_with_base(
    key: Key,
    base_params: Params,
    config: LoraConfig,
    quant: QuantConfig | None = None,
    *,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """A new adapter by the start that `config.init_lora_weights` names, and the base it goes with.

    Args:
        key: Random key, as for `init_adapter`.
        base_params: The base; it stays as it is.
        config: Ranks, targets, initialisation.
        quant: How targets are quantized, with starts that move the base; `"loftq"` needs it.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base, moved where the start moves it, and the adapter.

    Raises:
        InputError: as `init_adapter`, `init_pissa` and `init_loftq`.

    Example:
        >>> import jax
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora")
        >>> moved, adapter = init_with_base(jax.random.key(1), base, config)
        >>> bool((moved["q_proj"]["kernel"] == base["q_proj"]["kernel"]).all())
        False
    """
    name, _, niter = str(config.init_lora_weights).partition("_niter_")
    refuse_data_starts("init_with_base", config)
    if name == "pissa":
        turns = int(niter) if niter else None
        return init_pissa(base_params, config, quant, niter=turns, layouts=layouts)
    if name == "olora":
        return init_olora(base_params, config, quant, layouts=layouts)
    if name == "loftq":
        if quant is None:
            raise InputError("lora: init_lora_weights='loftq' needs a quant section; add one")
        turns = config.loftq_config.get("loftq_iter", 1)
        return init_loftq(base_params, config, quant, iterations=turns, layouts=layouts)
    if quant is not None:
        raise InputError(
            f"init_with_base: init_lora_weights={config.init_lora_weights!r} leaves the base as it"
            " is; quantize it before"
        )
    return base_params, init_adapter(key, base_params, config, layouts=layouts)


def without_start(
    adapter: Params, start: Params, config: LoraConfig
) -> tuple[dict[str, Any], LoraConfig]:
    """An adapter over the unmoved base that does what this one does over the moved base.

        W0 + s·A·B = W - s·A₀·B₀ + s·A·B = W + s·[A A₀]·[B; -B₀]

    Exact, at twice the rank, unless the moved base was quantized: what that lost stays lost.
    Magnitudes (DoRA) stay as they are: the sum has the same columns.

    Args:
        adapter: As trained.
        start: As it was when the base was moved.
        config: The config of both.

    Returns:
        The adapter and its config, with twice the ranks and alphas that keep the scaling.

    Raises:
        InputError: for `"loftq"`, whose base is the quantized one and not a low rank away.

    Example:
        >>> import jax
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        >>> moved, start = init_with_base(jax.random.key(1), base, config)
        >>> plain, config = without_start(start, start, config)
        >>> config.r, plain["q_proj"]["lora_A"].shape
        (4, (4, 4))
    """
    if config.init_lora_weights == "loftq":
        raise InputError(
            "without_start: an adapter that started with init_lora_weights='loftq' belongs to its"
            " quantized base; keep that, and let config.with_usual_start() say so"
        )
    leaves, before = dict(leaves_with_path(adapter)), dict(leaves_with_path(start))
    for path in [path for path in leaves if path.endswith("lora_A")]:
        path_b = f"{path.removesuffix('lora_A')}lora_B"
        a = jnp.concatenate([leaves[path], before[path]], axis=-1)
        b = jnp.concatenate([leaves[path_b], -before[path_b]], axis=-2)
        leaves[path], leaves[path_b] = _padding_last(a, b)
    return tree_from_paths(leaves), _twice(config)


def _padding_last(a: Array, b: Array) -> tuple[Array, Array]:
    """The same product with all columns and rows of zeros behind the others."""
    unused = ~(jnp.any(a != 0, axis=-2) | jnp.any(b != 0, axis=-1))
    order = jnp.argsort(unused, axis=-1, stable=True)
    a = jnp.take_along_axis(a, order[..., None, :], axis=-1)
    return a, jnp.take_along_axis(b, order[..., :, None], axis=-2)


def _twice(config: LoraConfig) -> LoraConfig:
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config.with_usual_start(),
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )
