"""Rotary positions, and the ways checkpoints stretch them over longer texts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .._errors import InputError
from .._typing import Array


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 stretches its positions: slow turns become slower, fast ones stay.

    A frequency whose wave is longer than `original / low_freq_factor` positions is divided by
    `factor`; one whose wave is shorter than `original / high_freq_factor` stays; between the two
    its share of either grows with `original / wavelength`.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.4.2, and the reference
    code released with Llama 3.1.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or not self.factor >= 1:
            raise InputError(
                "rope_scaling: needs factor of at least 1 and 0 < low_freq_factor <"
                f" high_freq_factor, got {self}"
            )

    def stretch(self, frequencies: np.ndarray) -> np.ndarray:
        """Frequencies, in radians per position, as this checkpoint was trained with."""
        waves = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        share = np.clip((waves - self.low_freq_factor) / span, 0, 1)
        return frequencies * (share + (1 - share) / self.factor)


def read_rope(rope: Mapping[str, Any], where: str) -> Llama3Rope | None:
    """The stretching that a config's `rope_scaling` or `rope_parameters` describe, or None.

    Raises:
        InputError: for a kind that is not known, or one that lacks a number.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"{where}: rope type {kind!r} is not supported; known: 'default', 'llama3'"
        )
    names = [field.name for field in dataclasses.fields(Llama3Rope)]
    for name in names:
        if type(rope.get(name)) not in (int, float) or not 0 < rope[name] < math.inf:
            got = rope.get(name)
            raise InputError(f"{where}: rope type 'llama3' needs a number for {name}, got {got!r}")
    return Llama3Rope(**{name: rope[name] for name in names})


def rope_angles(
    positions: Int[Array, "batch seq"],
    head_dim: int,
    theta: float,
    scaling: Llama3Rope | None = None,
) -> Float[Array, "batch seq half"]:
    """Angles p / theta^(2i/d) of rotary embeddings (Su et al. 2021, eq. 15), in radians."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is not None:
        frequencies = scaling.stretch(frequencies)
    return positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)


def rotate(
    x: Float[Array, "batch seq heads d"], angles: Float[Array, "batch seq half"]
) -> Float[Array, "batch seq heads d"]:
    """Turn the pairs (x_i, x_{i+d/2}) of each head by the angles, as Hugging Face pairs them."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
