"""The optimizer a config asks for."""

from collections.abc import Callable
from typing import Any

import optax

from .._typing import Params
from ..optim import adam_8bit, freeze_base, lora_fa, lora_plus, riemannian
from ._config import TrainSection


def learning_rate(config: TrainSection, steps: int) -> optax.Schedule:
    """Rise from 0 over the warm-up, then fall to a tenth (cosine), to 0 (linear) or stay.

    Example:
        >>> rate = learning_rate(TrainSection(learning_rate=1e-3, warmup=0.1), steps=100)
        >>> round(float(rate(0)), 6), round(float(rate(10)), 6), round(float(rate(100)), 6)
        (0.0001, 0.001, 0.0001)
    """
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.1),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # The first step must already move, so the warm-up starts one step in.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: TrainSection, steps: int, mask: Callable[[Params], Params]
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the config's AdamW on the leaves where `mask` is true; the others never move.

    Args:
        mask: From the trained tree to booleans: what is clipped, and may move (`Setup.mask`).
    """
    norm = config.clip_norm
    clip = optax.identity() if norm is None else optax.clip_by_global_norm(norm)
    adam = _ADAMS[config.optimizer](
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        **_options(config),
    )
    return freeze_base(optax.chain(clip, adam), mask)


_ADAMS: dict[str, Callable[..., Any]] = {
    "adamw": optax.adamw,
    "adamw_8bit": adam_8bit,
    "lora_plus": lora_plus,
    "lora_fa": lora_fa,
    "riemannian": riemannian,
}


def _options(config: TrainSection) -> dict[str, float]:
    return {
        "lora_plus": {"ratio": config.lora_plus_ratio},
        "riemannian": {"damping": config.riemannian_damping},
    }.get(config.optimizer, {})
