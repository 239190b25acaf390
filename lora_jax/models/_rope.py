"""Rotary positions, and the ways checkpoints stretch them over longer texts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .._errors import InputError
from .._typing import Array


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Positions divided by a factor (Chen et al. 2023, "Position Interpolation")."""

    kind: ClassVar[str] = "linear"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: np.ndarray, lengths: Array) -> Any:
        """All of them divided by the factor."""
        return frequencies / self.factor

    def reach(self, positions: int) -> int:
        """How far a model of so many positions reads."""
        return int(positions * self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """A base that grows with the text, once it is longer than those of training ("dynamic NTK").

    θ' = θ·(factor·n/original - (factor - 1))^(d / (d - 2)) for a text of n > original tokens.

    Source: the formula of transformers; bloc97 2023, "NTK-aware scaled RoPE".
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: np.ndarray, lengths: Array) -> Any:
        """Frequencies (batch, 1, half) for texts of these lengths (batch, 1, 1)."""
        grown = jnp.maximum(lengths / self.original_max_position_embeddings, 1.0)
        base = self.factor * grown - (self.factor - 1)
        half = len(frequencies)
        return frequencies * base ** (-np.arange(half) / max(half - 1, 1))

    def reach(self, positions: int) -> int:
        """How far a model of so many positions reads."""
        return int(positions * self.factor)


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """Fast turns stay, slow ones are divided by a factor, between the two a ramp.

    Scores are sharper by `attention_factor` on queries and keys each.

    Source: Peng et al. 2023, "YaRN", sections 3.2 to 3.4.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    rope_theta: float
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, frequencies: np.ndarray, lengths: Array) -> Any:
        """The ramp goes from pairs that turn `beta_fast` times to those that do `beta_slow`."""
        half = len(frequencies)

        def pair(turns: float) -> float:
            """The pair that turns so many times over the original length."""
            waves = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return half * math.log(waves) / math.log(self.rope_theta)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
        return frequencies * (1 - ramp + ramp / self.factor)

    def reach(self, positions: int) -> int:
        """How far a model of so many positions reads."""
        return max(positions, int(self.original_max_position_embeddings * self.factor))


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Each pair has a divisor of its own: one set for texts up to the original length, one beyond.

    Source: Ding et al. 2024, "LongRoPE"; the configs of Phi-3.
    """

    kind: ClassVar[str] = "longrope"
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    factor: float

    def stretch(self, frequencies: np.ndarray, lengths: Array) -> Any:
        """Frequencies (batch, 1, half) for texts of these lengths (batch, 1, 1)."""
        short, long = (frequencies / np.asarray(f) for f in (self.short_factor, self.long_factor))
        return jnp.where(lengths > self.original_max_position_embeddings, long, short)

    def reach(self, positions: int) -> int:
        """How far a model of so many positions reads."""
        return positions


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 stretches its positions: slow turns become slower, fast ones stay.

    A frequency whose wave is longer than `original / low_freq_factor` positions is divided by
    `factor`; one whose wave is shorter than `original / high_freq_factor` stays; between the two
    its share of either grows with `original / wavelength`.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.4.2, and the reference
    code released with Llama 3.1.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or not self.factor >= 1:
            raise InputError(
                "rope_scaling: needs factor of at least 1 and 0 < low_freq_factor <"
                f" high_freq_factor, got {self}"
            )

    def stretch(self, frequencies: np.ndarray, lengths: Any = None) -> Any:
        """Frequencies, in radians per position, as this checkpoint was trained with."""
        waves = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        share = np.clip((waves - self.low_freq_factor) / span, 0, 1)
        return frequencies * (share + (1 - share) / self.factor)

    def reach(self, positions: int) -> int:
        """How far a model of so many positions reads."""
        return positions


RopeScaling = LinearRope | DynamicRope | YarnRope | LongRope | Llama3Rope
_KINDS: dict[str, type[RopeScaling]] = {
    own.kind: own for own in (LinearRope, DynamicRope, YarnRope, LongRope, Llama3Rope)
}


def read_rope(
    rope: Mapping[str, Any], where: str, *, theta: float, positions: int, half: int
) -> RopeScaling | None:
    """The stretching that a config's `rope_scaling` or `rope_parameters` describe, or None.

    Args:
        rope: That object.
        where: The file's name, for errors.
        theta: The base of the rotary angles.
        positions: The config's `max_position_embeddings`.
        half: Pairs of a head that turn.

    Raises:
        InputError: for a kind that is not known, or one that lacks a number.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    own = _KINDS.get("longrope" if kind == "su" else str(kind))
    if own is None:
        known = ", ".join(repr(name) for name in ("default", *_KINDS))
        raise InputError(f"{where}: rope type {kind!r} is not supported; known: {known}")
    given = {name: value for name, value in rope.items() if value is not None}
    given.setdefault("original_max_position_embeddings", positions)
    given |= {"rope_theta": theta}
    if own is DynamicRope:  # counts from the model's own length, whatever else is given
        given |= {"original_max_position_embeddings": positions}
    if own is LongRope:
        given |= _lists(given, where, half)
        original = _number(given, "original_max_position_embeddings", where, kind)
        given.setdefault("factor", positions / original)
    if own in (YarnRope, LongRope):
        given.setdefault("attention_factor", _sharpness(own, given, where))
    values = {}
    for field in dataclasses.fields(own):
        if field.name in given or field.default is dataclasses.MISSING:
            values[field.name] = _value(given, field, where, kind)
    return own(**values)


def _value(given: Mapping[str, Any], field: Any, where: str, kind: str) -> Any:
    if field.name.endswith(("short_factor", "long_factor")):
        return given[field.name]
    if isinstance(field.default, bool):
        return bool(given[field.name])
    return _number(given, field.name, where, kind)


def _number(given: Mapping[str, Any], name: str, where: str, kind: str) -> Any:
    got: Any = given.get(name)
    if type(got) not in (int, float) or not 0 < got < math.inf:
        raise InputError(f"{where}: rope type {kind!r} needs a number for {name}, got {got!r}")
    return got


def _lists(given: Mapping[str, Any], where: str, half: int) -> dict[str, tuple[float, ...]]:
    lists = {}
    for name in ("short_factor", "long_factor"):
        value: Any = given.get(name)
        numbers = isinstance(value, list | tuple) and all(
            type(x) in (int, float) and x > 0 for x in value
        )
        if not numbers or len(value) != half:
            raise InputError(
                f"{where}: rope type 'longrope' needs {half} numbers for {name}, one for each pair"
                f" that turns, got {len(value) if isinstance(value, list) else value!r}"
            )
        lists[name] = tuple(float(x) for x in value)
    return lists


def _sharpness(own: type[RopeScaling], given: Mapping[str, Any], where: str) -> float:
    """What rotated queries and keys are multiplied by where the config does not say."""
    factor = _number(given, "factor", where, own.kind)
    if own is LongRope:
        original = given["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    own_scale, of_all = given.get("mscale"), given.get("mscale_all_dim")
    return scale(own_scale) / scale(of_all) if own_scale and of_all else scale(1.0)


def write_rope(scaling: RopeScaling | None, positions: int) -> dict[str, Any] | None:
    """`rope_scaling` as transformers reads it, for a model of so many positions.

    Example:
        >>> write_rope(LinearRope(2.0), 4096)
        {'rope_type': 'linear', 'factor': 2.0}
    """
    if scaling is None:
        return None
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(scaling).items()}
    if not isinstance(scaling, LongRope):
        return {"rope_type": scaling.kind, **plain}
    # transformers 4 wants these three alone, where the others are what follows from the lengths.
    lists = {name: plain[name] for name in ("short_factor", "long_factor")}
    kept = {name: plain[name] for name in ("original_max_position_embeddings",)}
    same = read_rope(
        {"rope_type": scaling.kind, **lists, **kept}, "", theta=1.0, positions=positions,
        half=len(scaling.short_factor),
    )  # fmt: skip
    others = {} if same == scaling else {n: plain[n] for n in ("factor", "attention_factor")}
    return {"type": scaling.kind, **lists, **others}


def rope_rotations(
    positions: Int[Array, "batch seq"],
    width: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "2 batch seq half"]:
    """Cosines and sines of the angles p / theta^(2i/d) (Su et al. 2021, eq. 15).

    Args:
        positions: Of every token; a row's text is as long as its last position tells.
        width: Entries of a head that turn, d.
        theta: The base.
        scaling: How the checkpoint stretches it.

    Example:
        >>> rope_rotations(jnp.array([[0, 1]]), 4, 10000.0).shape
        (2, 1, 2, 2)
    """
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    sharpness = 1.0
    if scaling is not None:
        lengths = jnp.max(positions, axis=1)[:, None, None] + 1
        frequencies = scaling.stretch(frequencies, lengths)
        sharpness = scaling.attention_factor
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    # Without a barrier XLA computes them anew for each head of each layer that is written out.
    return jax.lax.optimization_barrier(sharpness * jnp.stack([jnp.cos(angles), jnp.sin(angles)]))


def rotate(
    x: Float[Array, "batch seq heads d"], rotation: Float[Array, "2 batch seq half"]
) -> Float[Array, "batch seq heads d"]:
    """Turn the pairs (x_i, x_{i+half}) of each head, as Hugging Face pairs them; the rest stays."""
    cos, sin = rotation[:, :, :, None]
    width = 2 * rotation.shape[-1]
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)
