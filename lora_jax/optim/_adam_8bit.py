"""Adam whose two moments take one byte each."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._errors import InputError
from .._typing import Array
from ..quant._codebook import ZERO_CODE, dynamic_values, nearest_byte

BLOCK = 256
"""Numbers that share one absmax."""


class Bytes(NamedTuple):
    """A moment in 8 bits: `codes` uint8 in the shape of the leaf, `absmax` float32 per block.

    Blocks are those of the flattened leaf; the last one may be short.
    """

    codes: Array
    absmax: Array


class Adam8bitState(NamedTuple):
    """Steps so far, and both moments: `Bytes` or float32 at every leaf of the params."""

    count: Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def adam_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    min_8bit_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Adam (AdamW with `weight_decay`) with both moments in 8 bits, 2.03 bytes per parameter.

    `update = -learning_rate · (m̂ / (sqrt(v̂) + eps) + weight_decay · params)`; see
    `scale_by_adam_8bit` for the moments.

    Args:
        learning_rate: A number or a schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added outside the root, at least 0.
        weight_decay: Decoupled, as in AdamW; at least 0, and with 0 `params` are not needed.
        min_8bit_size: Leaves with fewer elements keep float32 moments.

    Returns:
        An optax transformation.  Under `optax.inject_hyperparams` only the learning rate can
        change: name the others in `static_args`.

    Raises:
        InputError: for a number out of its range.

    Example:
        >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
        >>> tx = adam_8bit(1e-3, weight_decay=0.1)
        >>> state = tx.init(params)
        >>> state[0].mu["kernel"].codes.dtype, state[0].mu["bias"].dtype
        (dtype('uint8'), dtype('float32'))
        >>> updates, state = tx.update(params, state, params)
        >>> round(float(optax.apply_updates(params, updates)["kernel"][0, 0]), 6)
        0.9989

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
    """
    if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
        _at_least_0("learning_rate", learning_rate)
    _at_least_0("weight_decay", weight_decay)
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps, min_8bit_size=min_8bit_size),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, min_8bit_size: int = 4096
) -> optax.GradientTransformation:
    """`m̂ / (sqrt(v̂) + eps)`, with m and v kept in 8 bits between steps.

    `m = b1·m + (1 - b1)·g`, `v = b2·v + (1 - b2)·g²`, `m̂ = m / (1 - b1^t)` and
    `v̂ = v / (1 - b2^t)` are float32, and the update is made before m and v are rounded.  A block of
    256 numbers x is stored as its absmax and the codes of `x / absmax` in the dynamic 8-bit type,
    signed for m, unsigned for v: what is below 1.6e-7 of its block's absmax becomes 0.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added outside the root, at least 0.
        min_8bit_size: Leaves with fewer elements keep float32 moments.

    Raises:
        InputError: for a number out of its range.

    Example:
        >>> tx = scale_by_adam_8bit(min_8bit_size=0)
        >>> gradient = jnp.array([3.0, -1.0, 0.0])
        >>> updates, state = tx.update(gradient, tx.init(gradient))
        >>> updates.round(4).tolist()
        [1.0, -1.0, 0.0]
        >>> state.mu.codes.tolist(), state.nu.codes.tolist()
        ([255, 47, 127], [255, 128, 0])

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise InputError(f"adam_8bit: {name} must be at least 0 and below 1, got {decay}")
    _at_least_0("eps", eps)
    _at_least_0("min_8bit_size", min_8bit_size)

    def zeros(leaf: Array, *, signed: bool) -> Bytes | Array:
        if leaf.size < min_8bit_size:
            return jnp.zeros(leaf.shape, jnp.float32)
        codes = jnp.full(leaf.shape, ZERO_CODE if signed else 0, jnp.uint8)
        return Bytes(codes, jnp.zeros(-(-leaf.size // BLOCK), jnp.float32))

    def init(params: Any) -> Adam8bitState:
        mu = jax.tree.map(lambda leaf: zeros(leaf, signed=True), params)
        nu = jax.tree.map(lambda leaf: zeros(leaf, signed=False), params)
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        one, two = _correction(b1, count), _correction(b2, count)

        def of_leaf(
            g: Array, mu: Bytes | Array, nu: Bytes | Array
        ) -> tuple[Array, Bytes | Array, Bytes | Array]:
            gradient = g.astype(jnp.float32)
            m = b1 * _to_floats(mu, signed=True) + (1 - b1) * gradient
            v = b2 * _to_floats(nu, signed=False) + (1 - b2) * gradient**2
            moved = (m / one) / (jnp.sqrt(v / two) + eps)
            if isinstance(mu, Bytes):
                return moved.astype(g.dtype), to_bytes(m, signed=True), to_bytes(v, signed=False)
            return moved.astype(g.dtype), m, v

        leaves, tree = jax.tree.flatten(updates)
        moments = (tree.flatten_up_to(moment) for moment in (state.mu, state.nu))
        parts = [of_leaf(*leaf) for leaf in zip(leaves, *moments, strict=True)]
        moved, mu, nu = (tree.unflatten([part[i] for part in parts]) for i in range(3))
        return moved, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def to_bytes(x: Array, *, signed: bool) -> Bytes:
    """The nearest 8-bit numbers, block by block."""
    blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(blocks).max(axis=1)
    # The reciprocal first, as bitsandbytes rounds; clamped where it would overflow.
    scale = 1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny)
    codes = nearest_byte(blocks * scale[:, None], signed=signed)
    return Bytes(codes.reshape(-1)[: x.size].reshape(x.shape), absmax)


def _to_floats(moment: Bytes | Array, *, signed: bool) -> Array:
    if not isinstance(moment, Bytes):
        return moment
    codes, absmax = moment
    blocks = jnp.pad(codes.reshape(-1), (0, -codes.size % BLOCK)).reshape(-1, BLOCK)
    values = dynamic_values(blocks, signed=signed) * absmax[:, None]
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


def _correction(decay: float, count: Array) -> Array:
    """`1 - decay^count`; in float32, 1 - 0.999 would be off by a part in 60,000."""
    log = math.log(decay) if decay else -math.inf
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _at_least_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"adam_8bit: {name} must be a number of at least 0, got {value}")
