"""Whether the kernels of `_mosaic_gpu` read a quantized tensor here, and how they are called."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._typing import Array
from ._codebook import CODEBOOKS


def why_not(q: Any, dtype: Any) -> str | None:
    """Why no kernel reads a `QuantizedTensor` in this process; None if kernels do."""
    if q.format not in CODEBOOKS or q.zeros is not None or q.flat:
        return "kernels read codebooks in blocks along d_in"
    if jax.default_backend() != "gpu":
        return "no GPU here to try kernels on"
    if jax.device_count() > 1:
        return "XLA cuts no kernel over devices"
    if 2 * q.codes.shape[-3] * q.codes.shape[-2] != q.d_in or not _kernels().tile_of(q.codes):
        return "kernels read whole blocks and multiples of 128 columns"
    return _kernels().why_not(q.format, jnp.dtype(q.scales.dtype).name, jnp.dtype(dtype).name)


def most_rows() -> int:
    """Rows of `x` up to which a product while reading beats a dense kernel."""
    return _kernels().MOST_ROWS


def dense(q: Any, dtype: Any) -> Array:
    """The dense `(*stack, d_in, d_out)`."""
    return _kernels().dense(_blocks(q), q.format, dtype)


def product(x: Array, q: Any) -> Array:
    """`x·dequantize(q)` for a few rows `(*batch, d_in)`."""
    y = _kernels().product(x.reshape(-1, q.d_in), _blocks(q), q.format)
    return y.reshape(*x.shape[:-1], -1)


def with_plain(kernel: Callable[..., Array], plain: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel that is mapped and differentiated as what it stands for."""
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def rule(_: int, is_mapped: Any, *args: Any) -> tuple[Array, bool]:
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, is_mapped)
        return jax.vmap(plain, axes)(*args), True

    call = jax.custom_jvp(mapped)
    call.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return call


def _blocks(q: Any) -> Any:
    return _kernels().Blocks(q.codes, q.scales, q.nested_scales, q.offset)


def _kernels() -> Any:
    """Imported where there is a GPU: it takes seconds."""
    from . import _mosaic_gpu

    return _mosaic_gpu
