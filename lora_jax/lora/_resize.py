"""Adapters of another rank, and the low-rank product nearest to a given one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._config import LoraConfig
from .._errors import InputError
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Array, Params
from ._single_layers import check_unmoved


def resize_adapter(
    adapter: Params, config: LoraConfig, rank: int
) -> tuple[dict[str, Any], LoraConfig]:
    """Give every layer one rank, with the delta nearest to its own.

        A'·B' = the rank-r SVD of scaling·A·B,    A' orthonormal

    The delta stays as it was, up to rounding, where it has no more directions than the new rank.
    Directions beyond them start as in a new adapter: A' has them, B' is zero.  A bias on B stays
    whole, times the old scaling.

    Args:
        adapter: As from `init_adapter`; modules it holds in full stay as they are.
        config: The config it was made with.
        rank: Of every layer; patterns of ranks and alphas end here.

    Returns:
        The adapter, of scaling 1, and its config with alpha = r.

    Raises:
        InputError: if the rank is not positive, the adapter lacks a part, or it belongs to a base
            that its start has moved.

    Example:
        >>> adapter = {"q": {"lora_A": jnp.ones((4, 3)), "lora_B": jnp.ones((3, 6)),
        ...                  "lora_scaling": jnp.float32(2)}}
        >>> config = LoraConfig(r=3, lora_alpha=6, target_modules=["q"])
        >>> small, config = resize_adapter(adapter, config, 1)
        >>> delta = small["q"]["lora_A"] @ small["q"]["lora_B"]
        >>> bool(jnp.allclose(delta, 6.0)), config.r, config.scaling("q")
        (True, 1, 1.0)

    Source: Eckart and Young 1936; the SVD of a product by way of two QR decompositions, Golub
    and Van Loan 2013, section 8.6.
    """
    if type(rank) is not int or rank < 1:
        raise InputError(f"resize_adapter: rank must be a positive integer, got {rank!r}")
    check_unmoved("resize_adapter", config)
    leaves = dict(leaves_with_path(adapter))
    for path_a in [path for path in leaves if path.endswith("lora_A")]:
        prefix = path_a.removesuffix("lora_A")
        path_b, path_scaling = f"{prefix}lora_B", f"{prefix}lora_scaling"
        if missing := [path for path in (path_b, path_scaling) if path not in leaves]:
            raise InputError(f"resize_adapter: {path_a} has no {missing[0]} beside it")
        scaling = jnp.asarray(leaves[path_scaling], jnp.float32)
        if (path_bias := f"{path_b}_bias") in leaves:
            bias = leaves[path_bias]
            leaves[path_bias] = (scaling[..., None] * bias).astype(bias.dtype)
        paths = (path_a, path_b, path_scaling)
        resized = _resized(leaves[path_a], leaves[path_b], scaling, rank)
        leaves |= dict(zip(paths, resized, strict=True))
    return tree_from_paths(leaves), unit_scaled(config, rank)


@functools.partial(jax.jit, static_argnums=3)
def _resized(a: Array, b: Array, scaling: Array, rank: int) -> tuple[Array, Array, Array]:
    """The factors of another rank, and their scaling."""
    factor = scaling[..., None, None]
    new_a, new_b = nearest_factors(a, factor * b, rank)
    # A layer without an adapter stays one.
    new_a = jnp.where(factor == 0, 0, new_a)
    return new_a.astype(a.dtype), new_b.astype(b.dtype), (scaling != 0).astype(jnp.float32)


def unit_scaled(config: LoraConfig, rank: int) -> LoraConfig:
    """The config with one rank and scaling 1 everywhere.

    Example:
        >>> unit_scaled(LoraConfig(r=8, lora_alpha=32, use_rslora=True), 4).scaling("q_proj")
        1.0
    """
    return dataclasses.replace(
        config.with_usual_start(),
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
    )


@functools.partial(jax.jit, static_argnums=2)
def nearest_factors(
    lora_A: Float[Array, "*stack d_in width"], lora_B: Float[Array, "*stack width d_out"], rank: int
) -> tuple[Float[Array, "*stack d_in new"], Float[Array, "*stack new d_out"]]:
    """The product of this rank that is nearest to A·B, which itself is never formed.

        A = Q_a·R_a,   Bᵀ = Q_b·R_b,   R_a·R_bᵀ = U·S·Vᵀ,   A' = Q_a·U,   B' = S·Vᵀ·Q_bᵀ

    Example:
        >>> a, b = nearest_factors(jnp.ones((4, 3)), jnp.ones((3, 6)), 2)
        >>> a.shape, bool(jnp.allclose(a @ b, 3.0, atol=1e-5))
        ((4, 2), True)
    """
    # Columns of zeros, so that Q_a has directions enough for a rank above the width.
    more = max(rank - lora_A.shape[-1], 0)
    wide_a = _padded(lora_A.astype(jnp.float32), lora_A.shape[-1] + more, axis=-1)
    wide_b = _padded(lora_B.astype(jnp.float32), lora_B.shape[-2] + more, axis=-2)
    # As in `dense_delta`: no product may be rounded to bfloat16.
    with jax.default_matmul_precision("highest"):
        q_a, r_a = jnp.linalg.qr(wide_a)
        q_b, r_b = jnp.linalg.qr(wide_b.mT)
        u, s, vt = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
        a = q_a @ u[..., :rank]
        b = (s[..., :rank, None] * vt[..., :rank, :]) @ q_b.mT
    return _padded(a, rank, axis=-1), _padded(b, rank, axis=-2)


def _padded(x: Array, size: int, *, axis: int) -> Array:
    """Zeros behind an axis up to a size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
