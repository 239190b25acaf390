"""cuDNN's attention, on GPUs where a trial shows that it works."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import first_line
from .._typing import Array

TOLERANCE = 0.02
"""Relative distance of 16-bit outputs and gradients from float32 ones that the trial accepts."""


@functools.cache
def why_not(dtype: str, group: int, d: int) -> str | None:
    """Why cuDNN does not compute attention in this process; None if it does.

    Some builds of CUDA and cuDNN refuse, or fail for one kind of mask. So a small product of the
    same type, heads to a key and width is tried once, with its gradients, against float32.

    Args:
        dtype: Name of the type of queries, keys and values.
        group: Query heads that share a key.
        d: Width of a head.

    Example:
        >>> why_not("float32", 1, 64)
        'float32 has more than 16 bits'
    """
    if jnp.dtype(dtype).itemsize != 2:
        return f"{dtype} has more than 16 bits"
    if jax.default_backend() != "gpu":
        return f"there is no GPU, but {jax.default_backend()}"
    try:
        with jax.ensure_compile_time_eval():
            off = _trial(dtype, group, d)
    except Exception as error:  # whatever it is, there is another path
        return f"cuDNN refuses: {first_line(error)}"
    return None if off <= TOLERANCE else f"cuDNN's results were {off:.2g} off"


def fused_attend(
    query: Array, key: Array, value: Array, mask: Array | None, scale: float | None = None
) -> Array:
    """Causal attention `(batch, seq, heads, d)` by cuDNN; `mask` hides more."""
    return _attention(query, key, value, mask, "cudnn", scale)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    by: Any,
    scale: float | None = None,
) -> Array:
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation=by, scale=scale
    )


def _trial(dtype: str, group: int, d: int) -> float:
    """Largest relative distance of outputs and gradients, under both kinds of mask."""
    seq, kv_heads = 128, 2
    random = np.random.default_rng(0)
    shapes = [(2, seq, kv_heads * group, d), (2, seq, kv_heads, d), (2, seq, kv_heads, d)]
    exact = [jnp.asarray(random.standard_normal(s), dtype).astype(jnp.float32) for s in shapes]
    segments = np.arange(seq) // 50
    packed = segments[:, None] == segments
    return max(
        _distance(exact, dtype, None),
        _distance(exact, dtype, jnp.asarray(np.broadcast_to(packed, (2, 1, seq, seq)))),
    )


def _distance(exact: list[Array], dtype: str, mask: Array | None) -> float:
    def results(function: Any, arrays: list[Array]) -> list[np.ndarray]:
        out, pull = jax.vjp(function, *arrays)
        gradients = pull(arrays[0])  # any cotangent of the output's shape
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    found = results(lambda q, k, v: fused_attend(q, k, v, mask), [x.astype(dtype) for x in exact])
    wanted = results(lambda q, k, v: _attention(q, k, v, mask, "xla"), exact)
    pairs = zip(found, wanted, strict=True)
    return max(float(np.linalg.norm(f - e) / np.linalg.norm(e)) for f, e in pairs)
