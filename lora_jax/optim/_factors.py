"""The two factors of one product: finding one from the other, and what its Gram matrix undoes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from .._errors import InputError
from .._tree import leaves_with_path, map_with_path
from .._typing import Array, Params

Sibling = Callable[[str, str], Array]
"""From the path of a factor and the name of a leaf beside it to that leaf."""


def siblings(what: str, params: Params | None, frozen_params: Params) -> Sibling:
    """Look up the leaves beside a factor, whether they are trained or frozen.

    Args:
        what: The transformation, for errors.
        params: What is trained.
        frozen_params: What `freeze_base` holds.

    Raises:
        InputError: without params, and from the look-up for a leaf that is in neither tree.

    Example:
        >>> look_up = siblings("lora_fa", {"lora_B": jnp.ones(2)}, {"lora_A": jnp.zeros(2)})
        >>> look_up("lora_B", "lora_A").tolist()
        [0.0, 0.0]
    """
    if params is None:
        raise InputError(f"{what}: needs the weights; call tx.update(updates, state, params)")
    weights = dict(leaves_with_path(frozen_params)) | dict(leaves_with_path(params))

    def look_up(path: str, name: str) -> Array:
        beside = path[: -len("lora_A")] + name
        leaf = weights.get(beside)
        if not hasattr(leaf, "shape"):  # missing, or masked out by optax
            raise InputError(
                f"{what}: {path} is there without {beside}; give the whole adapter, and freeze"
                " leaves with optim.freeze_base, which still shows them"
            )
        return jnp.asarray(leaf)

    return look_up


def factor_by_factor(
    what: str, change: Callable[[str, Any, Sibling], Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that changes every update by its path and the leaves beside it.

    Args:
        what: Its name, for errors.
        change: From a path, its update and `siblings` to the new update.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, frozen_params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        beside = siblings(what, params, frozen_params or {})
        return map_with_path(lambda path, g: change(path, g, beside), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def is_factor(path: str, leaf: Any, names: tuple[str, ...] = ("lora_A", "lora_B")) -> bool:
    """Whether a leaf is a factor with an array: optax puts empty nodes where it masks."""
    return path.endswith(names) and hasattr(leaf, "shape")


def is_embedding_factor(path: str) -> bool:
    """Whether a factor is that of a table that is looked up.

    Example:
        >>> is_embedding_factor("wte/embedding_lora_A"), is_embedding_factor("q_proj/lora_A")
        (True, False)
    """
    return path.rpartition("/")[2] in ("embedding_lora_A", "embedding_lora_B")


def solve_gram(
    factor: Float[Array, "*stack rank d"], right: Float[Array, "*stack rank n"], damping: float
) -> Float[Array, "*stack rank n"]:
    """`(F·Fᵀ + damping·I)⁻¹·right` in float32, where F is (rank, d).

    Rows of F that are zero, the padding of a stack, change no other row of the result, and their
    own stay zero where those of `right` are.  The damping is at least `rank · 1.2e-7` of the
    largest entry of F·Fᵀ, which float32 cannot tell from nothing: a F of lower rank than it has
    rows must not make NaN.

    Example:
        >>> solve_gram(jnp.ones((1, 3)), jnp.ones((1, 2)), damping=1.0).tolist()
        [[0.25, 0.25]]
    """
    rows, rank = factor.astype(jnp.float32), factor.shape[-2]
    # On TPU a default float32 product is rounded to bfloat16: too coarse to invert.
    gram = jnp.matmul(rows, rows.mT, precision=jax.lax.Precision.HIGHEST)
    largest = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)
    least = rank * float(jnp.finfo(jnp.float32).eps) * largest
    damped = gram + jnp.maximum(damping, least)[..., None, None] * jnp.eye(rank)
    # A product with an inverse would do, but mix rounding into rows that must stay zero.
    triangle = jax.lax.linalg.cholesky(damped)
    half = jax.lax.linalg.triangular_solve(
        triangle, right.astype(jnp.float32), left_side=True, lower=True
    )
    return jax.lax.linalg.triangular_solve(
        triangle, half, left_side=True, lower=True, transpose_a=True
    )


def check_damping(what: str, damping: float) -> None:
    """Refuse a damping that is no number above 0: a Gram matrix of zeros has no inverse."""
    if not 0 < damping < math.inf:
        raise InputError(f"{what}: damping must be a number above 0, got {damping}; try 1e-6")
