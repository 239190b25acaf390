"""The rules by which tensors of several adapters become one tensor."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._errors import InputError, nearest
from .._typing import Array, Key
from ..lora import drop

CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A combination type with its options, which `weighted_adapter` describes.

    Called with tensors, it is the sum Σ wᵢ·Xᵢ of what pruning leaves of them; for `ties` the
    mean, entry by entry, of those wᵢ·Xᵢ whose Xᵢ has the elected sign.

    Raises:
        InputError: for an option that is missing, has no effect or is out of its range.

    Example:
        >>> rule = Rule("magnitude_prune", density=0.5)
        >>> rule([jnp.array([[3.0, 1.0]]), jnp.array([[2.0, -4.0]])], jnp.array([1.0, 10.0]))
        Array([[  3., -40.]], dtype=float32)
        >>> Rule("ties", density=1.0)(
        ...     [jnp.array([[3.0, 1.0]]), jnp.array([[2.0, -4.0]])], jnp.array([1.0, 10.0]))
        Array([[ 11.5, -40. ]], dtype=float32)
    """

    type: str
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        for name, known in (
            ("type", get_args(CombinationType)),
            ("majority_sign_method", get_args(MajoritySign)),
        ):
            value = getattr(self, name)
            if value not in known:
                what = "combination_type" if name == "type" else name
                raise InputError(
                    f"weighted_adapter: {what} must be one of {', '.join(known)}; got {value!r}"
                    f"{nearest(str(value), known)}"
                )
        prunes = self.base not in ("svd", "linear", "cat")
        if not prunes and self.density is not None:
            raise InputError(
                f"weighted_adapter: {self.type} prunes nothing, got density={self.density}; leave"
                " it out"
            )
        if prunes and not 0 < (self.density or 0) <= 1:
            raise InputError(
                f"weighted_adapter: {self.type} needs the density it keeps, in (0, 1], got"
                f" {self.density}; 0.5, say"
            )

    @property
    def base(self) -> str:
        """The rule itself, whether for factors or for deltas."""
        return self.type.removesuffix("_svd")

    @property
    def is_random(self) -> bool:
        return self.base.startswith("dare")

    def __call__(
        self,
        tensors: list[Array],
        weights: Float[Array, "adapters"],
        keys: list[Key] | None = None,
    ) -> Array:
        # Votes and means of 16-bit numbers would be rounded.
        wide = [x.astype(jnp.float32) for x in tensors]
        own = keys if keys else [None] * len(wide)
        pruned = [self._prune(x, key) for x, key in zip(wide, own, strict=True)]
        if not self.base.endswith("ties"):
            return _sum(pruned, weights)
        return _mean_of_elected(pruned, weights, self.majority_sign_method == "total")

    def _prune(self, x: Array, key: Key | None) -> Array:
        if self.density is None:
            return x
        return drop(x, key, 1 - self.density) if self.is_random else _largest(x, self.density)


@functools.partial(jax.jit, static_argnums=1)
def _largest(x: Array, density: float) -> Array:
    """The share `density` of largest magnitude, rounded down to a number; zero elsewhere."""
    _, kept = jax.lax.top_k(jnp.abs(x).ravel(), int(density * x.size))
    mask = jnp.zeros(x.size, bool).at[kept].set(True)
    return jnp.where(mask.reshape(x.shape), x, 0)


@jax.jit
def _sum(tensors: list[Array], weights: Array) -> Array:
    return (weights[:, None, None] * jnp.stack(tensors)).sum(0)


@functools.partial(jax.jit, static_argnums=2)
def _mean_of_elected(tensors: list[Array], weights: Array, by_size: bool) -> Array:
    stack = jnp.stack(tensors)
    # Before they are weighted, as in PEFT: a negative weight turns what was elected.
    votes = stack if by_size else jnp.sign(stack)
    elected = jnp.where(votes.sum(0) >= 0, 1, -1)
    follows = jnp.sign(stack) == elected
    weighted = jnp.where(follows, weights[:, None, None] * stack, 0)
    return weighted.sum(0) / jnp.maximum(follows.sum(0), 1)
