"""Adapters that start from a part of the weights, and move the base for it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._quant_config import QuantConfig
from .._tree import combine, leaves_with_path, map_with_path, tree_from_paths
from .._typing import Array, Params
from ..quant import QuantizedTensor, dequantize, quantize
from ._init import fresh_adapter, magnitudes
from ._layout import Layouts, as_matrix
from ._linear import dense_delta
from ._targets import Target, adapter_names, find_targets, is_embedding, magnitude_name


def init_pissa(
    base_params: Params,
    config: LoraConfig,
    quant: QuantConfig | None = None,
    *,
    niter: int | None = None,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Give the adapter the largest singular directions of each weight, and the base the rest.

        W = U·S·Vᵀ,    A = U_r·√(S_r/scaling),    B = √(S_r/scaling)·V_rᵀ,    W0 = W - scaling·A·B

    Args:
        base_params: Dense weights; they stay as they are.
        config: Ranks and targets, as for `init_adapter`.
        quant: How the base of each target is quantized, if at all. What is left without its
            largest directions is narrower, and loses less.
        niter: Power iterations of a randomized decomposition, much faster than the exact one for
            large weights; 4 come near it, 16 nearer.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base with its targets moved, and the adapter. Without `quant` they compute what the
        base did; an adapter trained so belongs to the moved base.

    Raises:
        InputError: if a target is quantized already, or has a rank above its smaller dimension.

    Example:
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"])
        >>> moved, adapter = init_pissa(base, config)
        >>> jnp.linalg.matrix_rank(moved["q_proj"]["kernel"], rtol=1e-5)
        Array(2, dtype=int32)

    Source: Meng et al. 2024, "PiSSA", equations 2 to 4; QPiSSA in its section 4; Halko et al. 2011,
    "Finding structure with randomness", algorithms 4.4 and 5.1.
    """
    svd = _svd if niter is None else functools.partial(_randomized_svd, niter=niter)

    def split(weight: Array, target: Target) -> tuple[Any, Array, Array]:
        a, b = low_rank(weight, target, config, svd)
        return without_delta(weight, a, b, target, quant), a, b

    return split_weights(base_params, config, layouts, split)


def init_olora(
    base_params: Params,
    config: LoraConfig,
    quant: QuantConfig | None = None,
    *,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Give the adapter the first columns of an orthogonal basis of each weight, and what is along.

        Wᵀ = Q·R,    A = R_rᵀ,    B = Q_rᵀ,    W0 = W - scaling·A·B

    Args:
        base_params, config, quant, layouts: As for `init_pissa`.

    Returns:
        The base with its targets moved, and the adapter.

    Raises:
        InputError: as `init_pissa`.

    Example:
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
        >>> config = LoraConfig(r=2, target_modules=["q_proj"])
        >>> moved, adapter = init_olora(base, config)
        >>> b = adapter["q_proj"]["lora_B"]
        >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
        True

    Source: Büyükakyüz 2024, "OLoRA", algorithm 1.
    """

    def split(weight: Array, target: Target) -> tuple[Any, Array, Array]:
        check_rank(target)
        a, b = _orthogonal_factors(weight, target)
        a, b = as_adapter(a, b, target, config)
        return without_delta(weight, a, b, target, quant), a, b

    return split_weights(base_params, config, layouts, split)


def init_loftq(
    base_params: Params,
    config: LoraConfig,
    quant: QuantConfig,
    *,
    iterations: int = 1,
    layouts: Layouts | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Quantize each weight, and let the adapter start where it makes good most of the error.

        Q = quantize(W - scaling·A·B),    scaling·A·B = the rank-r SVD of W - dequantize(Q)

    in turn, `iterations` times, from A·B = 0. The scaling is part of it, whatever alpha is.

    Args:
        base_params: Dense weights; they stay as they are.
        config: Ranks and targets, as for `init_adapter`.
        quant: How the targets are quantized, in any format.
        iterations: How often the two take turns.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Returns:
        The base with its targets quantized, and the adapter.

    Raises:
        InputError: as `init_pissa`, or if there is no iteration.

    Example:
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}
        >>> config = LoraConfig(r=8, target_modules=["q_proj"])
        >>> quantized, adapter = init_loftq(base, config, QuantConfig())
        >>> q = quantized["q_proj"]["kernel"]
        >>> bare = dequantize(q) - base["q_proj"]["kernel"]
        >>> delta = adapter["q_proj"]["lora_A"] @ adapter["q_proj"]["lora_B"]
        >>> bool(jnp.linalg.norm(bare + delta) < 0.85 * jnp.linalg.norm(bare))
        True

    Source: Li et al. 2023, "LoftQ", algorithm 1.
    """
    if iterations < 1:
        raise InputError(f"init_loftq: iterations must be at least 1, got {iterations}")

    def split(weight: Array, target: Target) -> tuple[Any, Array, Array]:
        q = _quantize(weight, quant, target)
        a, b = low_rank(weight - dequantize(q, jnp.float32), target, config)
        for _ in range(iterations - 1):
            q = without_delta(weight, a, b, target, quant)
            a, b = low_rank(weight - dequantize(q, jnp.float32), target, config)
        return q, a, b

    return split_weights(base_params, config, layouts, split)


def split_weights(
    base_params: Params,
    config: LoraConfig,
    layouts: Layouts | None,
    split: Callable[[Array, Target], tuple[Any, Array, Array]],
) -> tuple[Params, dict[str, Any]]:
    """The base and the adapter once every target's weight has been split, one after the other."""
    params = dict(leaves_with_path(base_params))
    moved: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    for target in find_targets(base_params, config, layouts=layouts):
        weight = params[target.path]
        if isinstance(weight, QuantizedTensor):
            raise InputError(
                f"{target.path}: is quantized already, and its error cannot be known; give the"
                " dense weights"
            )
        own, a, b = split(jnp.asarray(weight, jnp.float32), target)
        dense = not isinstance(own, QuantizedTensor)
        moved[target.path] = own.astype(weight.dtype) if dense else own
        name_a, name_b, _ = adapter_names(target.path)
        factors |= {name_a: a, name_b: b}
        if config.use_dora:
            parts = (moved[target.path], target, a, b, _scaling(target))
            factors[magnitude_name(target.path)] = magnitudes(*parts)
    # Scalings and whole modules; the factors in it are replaced.
    fresh = fresh_adapter(jax.random.key(0), base_params, config, layouts)
    base = map_with_path(lambda path, leaf: moved.get(path, leaf), base_params)
    return base, combine(fresh, tree_from_paths(factors))


def _svd(matrices: Array, width: int) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    return u[..., :width], s[..., :width], vt[..., :width, :]


def check_rank(target: Target) -> None:
    """Refuse a rank that a matrix of this shape cannot have."""
    if max(target.ranks) > min(target.d_in, target.d_out):
        raise InputError(
            f"{target.path}: rank {max(target.ranks)} exceeds the smaller side of"
            f" ({target.d_in}, {target.d_out}); lower r or rank_pattern"
        )


def low_rank(
    weight: Array, target: Target, config: LoraConfig, svd: Callable[..., Any] = _svd
) -> tuple[Array, Array]:
    """A and B, in the adapter's type, with scaling·A·B nearest to the weight at the ranks given.

    Args:
        svd: From matrices and a number of directions to the largest singular ones.

    Raises:
        InputError: for a rank above the target's smaller dimension.
    """
    check_rank(target)
    a, b = _nearest_factors(weight, target, svd)
    return as_adapter(a, b, target, config)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest_factors(weight: Array, target: Target, svd: Callable[..., Any]) -> tuple[Array, Array]:
    width = max(target.ranks)
    scalings = jnp.asarray(target.of_matrices(target.scalings), jnp.float32)
    u, s, vt = svd(layer_matrices(weight, target), width)
    used = _used(target)
    root = jnp.where(used, jnp.sqrt(s / jnp.where(used, scalings[:, None], 1.0)), 0.0)
    return u * root[:, None, :], root[:, :, None] * vt


@functools.partial(jax.jit, static_argnums=1)
def _orthogonal_factors(weight: Array, target: Target) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(layer_matrices(weight, target).swapaxes(-1, -2))
    width, used = max(target.ranks), _used(target)
    a = jnp.where(used[:, None, :], r[:, :width].swapaxes(-1, -2), 0.0)
    return a, jnp.where(used[:, :, None], q[..., :width].swapaxes(-1, -2), 0.0)


def _used(target: Target) -> np.ndarray:
    """(matrices, width): which directions the rank of each matrix has."""
    return np.arange(max(target.ranks)) < target.of_matrices(target.ranks)[:, None]


def _randomized_svd(matrices: Array, width: int, niter: int) -> tuple[Array, Array, Array]:
    """The largest singular directions of matrices, from their products with a few vectors."""
    rows, columns = matrices.shape[-2:]
    # A few vectors more than are wanted: the last directions of a basis are its worst.
    count = min(width + 10, rows, columns)
    basis = matrices @ jax.random.normal(jax.random.key(0), (columns, count))
    for _ in range(niter):
        basis, _ = jnp.linalg.qr(basis)
        basis, _ = jnp.linalg.qr(matrices.swapaxes(-1, -2) @ basis)
        basis = matrices @ basis
    basis, _ = jnp.linalg.qr(basis)
    u, s, vt = _svd(basis.swapaxes(-1, -2) @ matrices, width)
    return basis @ u, s, vt


def layer_matrices(weight: Array, target: Target) -> Array:
    """The weights of all layers and experts as (matrices, d_in, d_out)."""
    kernels = weight.reshape(-1, *weight.shape[len(target.lead) :])
    return jax.vmap(lambda kernel: as_matrix(kernel, _contracting(target)))(kernels)


def as_adapter(a: Array, b: Array, target: Target, config: LoraConfig) -> tuple[Array, Array]:
    """Factors (matrices, d_in, rank) and (matrices, rank, d_out) as the tree has them."""
    a, b = (x.reshape(*target.lead, *x.shape[1:]) for x in (a, b))
    dtype = jnp.dtype(config.adapter_dtype)
    return a.astype(dtype), b.astype(dtype)


def without_delta(
    weight: Array, a: Array, b: Array, target: Target, quant: QuantConfig | None
) -> Any:
    """The weight without the adapter's delta."""
    rest = weight - dense_delta(
        a, b, _scaling(target), weight.shape[len(target.lead) :], _contracting(target)
    )
    return rest if quant is None else _quantize(rest, quant, target)


def _scaling(target: Target) -> Array:
    return jnp.asarray(target.of_matrices(target.scalings), jnp.float32).reshape(target.lead)


def _quantize(weight: Array, quant: QuantConfig, target: Target) -> QuantizedTensor:
    # Rows of a table are looked up, and its blocks therefore run along a row.
    axes = (1,) if is_embedding(target.path) else _contracting(target)
    return quantize(weight, quant, stacked=len(target.lead), contracting=axes)


def _contracting(target: Target) -> tuple[int, ...]:
    return target.layout.contracting or (0,)
