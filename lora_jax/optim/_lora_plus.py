"""LoRA+: `lora_B` learns faster than `lora_A`."""

import math
from typing import Any

import jax
import optax

from .._errors import InputError
from .._tree import map_with_path
from ._factors import is_embedding_factor


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    ratio: float = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with `lr_B = ratio · lr_A`.

    Any other optimizer becomes LoRA+ by `optax.chain(tx, scale_lora_b(ratio))`.

    Args:
        learning_rate: A number or a schedule: that of `lora_A`, and of whatever is no `lora_B`.
        b1, b2, eps: As in `optax.adamw`.
        weight_decay: Decoupled; times its learning rate, so that of `lora_B` is larger too.
        ratio: lr_B / lr_A, above 0.

    Returns:
        An optax transformation for a tree that holds factors named as `init_adapter` does.  Under
        `optax.inject_hyperparams` only the learning rate can change: name the others in
        `static_args`.

    Raises:
        InputError: for a ratio out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = {"q": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 3))}}
        >>> tx = lora_plus(1e-3, ratio=4.0)
        >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
        >>> [round(float(updates["q"][name][0, 0]), 5) for name in ("lora_A", "lora_B")]
        [-0.001, -0.004]

    Source:
        Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4,
        which recommends a ratio near 16.
    """
    return optax.chain(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay), scale_lora_b(ratio)
    )


def scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """Multiply the updates of `lora_B` and its bias by `ratio`; put it behind an optimizer.

    The rate of B grows because A has many inputs to sum over.  An embedding looks one up, so its
    factors keep their updates, and so does whatever is no factor.  (PEFT gives an embedding's two
    factors a rate of their own, 1e-6, and one-dimensional parameters that of B.)

    Args:
        ratio: Above 0.

    Raises:
        InputError: for a ratio out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> updates = {"lora_A": jnp.ones(1), "lora_B": jnp.ones(1)}
        >>> scale_lora_b(4.0).update(updates, optax.EmptyState())[0]["lora_B"].tolist()
        [4.0]

    Source:
        Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
    """
    if not 0 < ratio < math.inf:
        raise InputError(f"lora_plus: ratio must be a number above 0, got {ratio}; try 16")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(path: str, update: Any) -> Any:
            if not path.endswith(("lora_B", "lora_B_bias")) or is_embedding_factor(path):
                return update
            return jax.tree.map(lambda x: x * ratio, update)

        return map_with_path(scaled, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
