"""LoRA-FA: `lora_A` is frozen, and `lora_B` follows the gradient of the whole weight."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from .._tree import map_with_path
from .._typing import Array, Params
from ._factors import (
    Sibling,
    check_damping,
    factor_by_factor,
    is_embedding_factor,
    is_factor,
    solve_gram,
)
from ._freeze import freeze_base


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    damping: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on `lora_B` with `g_B = (Aᵀ·A)⁻¹·∂L/∂B / scaling²`; `lora_A` stays as it is.

    There is no state for A.  An embedding's adapter is trained as by AdamW, both factors: its A
    starts at zero, from where it would have to move first.

    Args:
        learning_rate: A number or a schedule.
        b1, b2, eps: As in `optax.adamw`.
        weight_decay: Decoupled, on what moves.
        damping: Added to the diagonal of Aᵀ·A, above 0.

    Returns:
        An optax transformation for an adapter, or for a base combined with one if it is inside
        `freeze_base`.  `update` needs `params`, since it reads A and the scaling; put
        `optax.MultiSteps`, which passes no frozen weights on, outside `freeze_base`.  Under
        `optax.inject_hyperparams` only the learning rate can change: name the others in
        `static_args`.

    Raises:
        InputError: for a damping out of its range, and from `update` without `params`, or if A
            or the scaling of a `lora_B` is hidden (as by `optax.masked`).

    Example:
        >>> one = {"lora_A": jnp.eye(3, 2), "lora_B": jnp.ones((2, 3)), "lora_scaling": 2.0}
        >>> adapter = {"q": {name: jnp.asarray(x) for name, x in one.items()}}
        >>> tx = freeze_base(lora_fa(1e-3))
        >>> updates, state = tx.update(adapter, tx.init(adapter), adapter)
        >>> [round(float(jnp.abs(u).max()), 6) for u in updates["q"].values()]
        [0.0, 0.001, 0.0]

    Source:
        Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language
        Models Fine-tuning"; the gradient is the B whose delta is nearest the full gradient.
    """
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return freeze_base(
        optax.chain(scale_by_lora_fa(damping), adamw), without_lora_a(_all_but_scalings)
    )


def scale_by_lora_fa(damping: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient of `lora_B` by `(Aᵀ·A + damping·I)⁻¹·g / scaling²`.

    With the weight's gradient G, `g = scaling·Aᵀ·G`, and the result is the one whose change
    `scaling·A·g_B` of the weight is nearest to G: G projected on what A spans.  Everything else
    passes, also the gradient of A, and both of an embedding's; where the scaling is 0, so is the
    result.

    Args:
        damping: Above 0.

    Raises:
        InputError: as `lora_fa`.

    Example:
        >>> params = {"lora_A": jnp.eye(3, 1) * 2, "lora_B": jnp.zeros((1, 3))}
        >>> params["lora_scaling"] = jnp.float32(0.5)
        >>> grads = {"lora_B": jnp.ones((1, 3))}
        >>> tx = scale_by_lora_fa()
        >>> tx.update(grads, tx.init(grads), params)[0]["lora_B"].tolist()
        [[1.0, 1.0, 1.0]]

    Source:
        Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language
        Models Fine-tuning".
    """
    check_damping("lora_fa", damping)

    def scaled(path: str, g: Any, beside: Sibling) -> Any:
        if not is_factor(path, g, ("lora_B",)) or is_embedding_factor(path):
            return g
        solved = solve_gram(beside(path, "lora_A").mT, g, damping)
        return (_over_square(beside(path, "lora_scaling")) * solved).astype(g.dtype)

    return factor_by_factor("lora_fa", scaled)


def without_lora_a(mask: Callable[[Params], Params]) -> Callable[[Params], Params]:
    """A mask's leaves but those that LoRA-FA leaves as they are: each A but an embedding's.

    Example:
        >>> mask = without_lora_a(lambda params: dict.fromkeys(params, True))
        >>> mask({"lora_A": 1, "lora_B": 2, "embedding_lora_A": 3})
        {'lora_A': False, 'lora_B': True, 'embedding_lora_A': True}
    """

    def moves(path: str, chosen: bool) -> bool:
        return chosen and (not path.endswith("lora_A") or is_embedding_factor(path))

    return lambda params: map_with_path(moves, mask(params))


def _all_but_scalings(params: Params) -> Params:
    return map_with_path(lambda path, _: not path.endswith("lora_scaling"), params)


def _over_square(scaling: Array) -> Array:
    """`1 / scaling²` for every factor of a stack; 0 for a layer without an adapter."""
    safe = jnp.where(scaling == 0, 1.0, scaling)
    return jnp.where(scaling == 0, 0.0, 1 / safe**2)[..., None, None]
