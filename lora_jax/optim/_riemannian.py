"""Riemannian preconditioning: each factor's gradient is rescaled by the other factor."""

from typing import Any

import optax

from ._factors import Sibling, check_damping, factor_by_factor, is_factor, solve_gram


def riemannian(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    damping: float = 1e-2,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose gradients first pass `scale_by_riemannian`.

    Args:
        learning_rate: A number or a schedule.
        b1, b2, eps: As in `optax.adamw`.
        weight_decay: Decoupled, as in AdamW.
        damping: Added to the diagonals of Aᵀ·A and B·Bᵀ, above 0; PEFT's default.

    Returns:
        An optax transformation; `update` needs `params`.  Under `optax.inject_hyperparams` only
        the learning rate can change: name the others in `static_args`.

    Raises:
        InputError: as `scale_by_riemannian`.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = {"q": {"lora_A": jnp.eye(3, 2), "lora_B": jnp.eye(2, 3)}}
        >>> tx = riemannian(1e-3)
        >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
        >>> round(float(updates["q"]["lora_A"][0, 0]), 6)
        -0.001

    Source:
        Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation
        Models", scaled AdamW.
    """
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return optax.chain(scale_by_riemannian(damping), adamw)


def scale_by_riemannian(damping: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    """`g_A·(B·Bᵀ + damping·I)⁻¹` for `lora_A` and `(Aᵀ·A + damping·I)⁻¹·g_B` for `lora_B`.

    But for the damping, a step of gradient descent then moves A·B alike however the product is
    split: with an invertible M, `A·M` and `M⁻¹·B` go the same way as A and B.  Whatever is no
    factor passes.  (PEFT leaves an embedding's factors out; here they are factors like any.)

    Args:
        damping: Above 0.  What it is small against is B·Bᵀ, which starts at zero.

    Raises:
        InputError: for a damping out of its range, and from `update` without `params`, or if one
            factor of a product is hidden (as by `optax.masked`).

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"lora_A": 2 * jnp.eye(3, 1), "lora_B": 3 * jnp.ones((1, 4))}
        >>> grads = {"lora_A": jnp.full((3, 1), 37.0), "lora_B": jnp.full((1, 4), 5.0)}
        >>> tx = scale_by_riemannian(damping=1.0)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["lora_A"][0, 0].round(5).tolist(), updates["lora_B"][0, 0].round(5).tolist()
        (1.0, 1.0)

    Source:
        Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation
        Models", scaled gradient descent.
    """
    check_damping("riemannian", damping)

    def scaled(path: str, g: Any, beside: Sibling) -> Any:
        if not is_factor(path, g):
            return g
        if path.endswith("lora_A"):
            solved = solve_gram(beside(path, "lora_B"), g.mT, damping).mT
        else:
            solved = solve_gram(beside(path, "lora_A").mT, g, damping)
        return solved.astype(g.dtype)

    return factor_by_factor("riemannian", scaled)
