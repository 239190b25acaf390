"""`x·W` with a frozen quantized `W`, dequantized again for the gradient rather than kept."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .._errors import InputError, nearest
from .._mesh_axes import mesh_size
from .._typing import Array
from . import _gpu
from ._tensor import QuantizedTensor, absmax, block_values, cuts_in_use, gathered, matrix

PATHS = {
    "dense": "one dense kernel in front of one product",
    "split": "one product for each half of a block, which XLA fuses with the dequantization",
    "slabs": "slabs of columns in turn, each dense in front of its product",
    "kernel": "one GPU kernel that multiplies each code as it is read",
}
"""How a product may be computed, by name."""
LARGEST_DENSE = 256 * 2**20
"""Bytes of a kernel above which only a slab of its columns is dense at a time."""
SPLIT_TOKENS = 256
"""Rows of `x` up to which a TPU multiplies the halves of blocks.

Compiled for a v5e, that moves fewer bytes at any number of tokens (34 MB, not 503, at one; 536, not
654, at 2,048).  With many of them a fused product may dequantize again for every tile of tokens,
which no TPU has been at hand to measure.
"""


@dataclasses.dataclass(frozen=True)
class MatmulPath:
    """How `quantized_matmul` computes a product, and why.

    `dense_bytes` is what of the kernel is dense at one time, 0 where nothing has to be.
    """

    name: str
    why: str
    dense_bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {PATHS[self.name]} ({self.why}; {self.dense_bytes / 2**20:.1f} MiB)"


def quantized_matmul(
    x: Float[Array, "*batch d_in"],
    q: QuantizedTensor,
    *,
    precision: Any = None,
    path: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a quantized kernel, flattened to `(d_in, d_out)`.

        y = x·dequantize(q),    dx = dy·dequantize(q)ᵀ

    The kernel is frozen: it gets no gradient. Only its codes are kept for the backward pass,
    which dequantizes again.

    Args:
        x: Inputs; the kernel is dequantized to their dtype.
        q: One kernel without stack axes (scan or vmap over those).
        precision: As in `jax.lax.dot_general`.
        path: One of `PATHS`, for measurements; by default the one that `explain` tells.

    Returns:
        Outputs in the dtype of `x`.

    Raises:
        InputError: if `q` is stacked, the last axis of `x` is not d_in, or there is no such
            path for this kernel.

    Example:
        >>> from lora_jax.quant import quantize
        >>> quantized_matmul(jnp.ones((5, 64)), quantize(jnp.ones((64, 4, 2)))).shape
        (5, 8)

    Source: Dettmers et al. 2023, "QLoRA", equation 5.
    """
    _check(x, q, path)
    return _matmul(precision, path, x, q)


def explain(
    x: Array | jax.ShapeDtypeStruct, q: QuantizedTensor, *, backend: str | None = None
) -> MatmulPath:
    """The path that `quantized_matmul(x, q)` takes on a backend.

    Args:
        x: Inputs `(*batch, d_in)`, or their shape and dtype.
        q: The kernel, or its shapes (`jax.eval_shape`).
        backend: `"cpu"`, `"gpu"` or `"tpu"`; the default backend's by default.

    Raises:
        InputError: as `quantized_matmul`.

    Example:
        >>> from lora_jax.quant import quantize
        >>> x, q = jnp.ones((1, 64)), quantize(jnp.ones((64, 1024)))
        >>> print(explain(x, q, backend="cpu"))
        dense: one dense kernel in front of one product (fits and is read once; 0.2 MiB)
        >>> explain(x, q, backend="tpu").name
        'split'
    """
    _check(x, q, None)
    backend = backend or jax.default_backend()
    tokens = math.prod(x.shape[:-1]) // mesh_size("data", "fsdp", "sequence")
    whole = _dense_bytes(q, x.dtype)
    no_kernel = _gpu.why_not(q, x.dtype) if backend == "gpu" else None
    if backend == "gpu" and no_kernel is None and tokens <= _gpu.most_rows():
        return MatmulPath("kernel", f"{tokens} tokens", 0)
    if (slabs := _slab_count(q, whole)) > 1:
        return MatmulPath("slabs", f"{whole / 2**20:.0f} MiB in all", whole // slabs)
    if backend == "tpu" and tokens <= SPLIT_TOKENS and not q.flat:
        return MatmulPath("split", f"{tokens} tokens", 0)
    why = "blocks run over columns" if q.flat else "fits and is read once"
    return MatmulPath("dense", f"{why}; {no_kernel}" if no_kernel else why, whole)


def _check(x: Any, q: QuantizedTensor, path: str | None) -> None:
    if q.codes.ndim != 3:
        raise InputError(
            f"quantized_matmul: q must hold one kernel, got a stack {q.shape};"
            " use jax.vmap or a scan over its leading axes"
        )
    if x.shape[-1] != q.d_in:
        raise InputError(
            f"quantized_matmul: the last axis of x {x.shape} must be d_in={q.d_in} of a"
            f" kernel {q.kernel_shape}; flatten its contracted axes {q.contracting} in x"
        )
    if path is not None and path not in PATHS:
        raise InputError(
            f"quantized_matmul: there is no path {path!r}{nearest(path, PATHS)}; use"
            f" {', '.join(PATHS)}, or leave it out"
        )
    if path == "kernel" and (why := _gpu.why_not(q, x.dtype)):
        raise InputError(f"quantized_matmul: path 'kernel' is not to be had: {why}; leave it out")
    if path in ("split", "slabs") and q.flat:
        raise InputError(
            f"quantized_matmul: path {path!r} needs blocks along d_in, and this kernel's run over"
            " columns; leave it out"
        )


def _dense_bytes(q: QuantizedTensor, dtype: Any) -> int:
    """Bytes of the dense kernel on one device."""
    return q.d_in * q.d_out * jnp.dtype(dtype).itemsize // math.prod(cuts_in_use(q))


def _slab_count(q: QuantizedTensor, whole: int) -> int:
    """Slabs of a device's columns: so many that one may be dense, and that they divide evenly."""
    if whole <= LARGEST_DENSE or q.flat:
        return 1
    least, columns = -(-whole // LARGEST_DENSE), q.d_out // cuts_in_use(q)[1]
    return next((n for n in range(least, 8 * least) if columns % n == 0), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(precision: Any, path: str | None, x: Array, q: QuantizedTensor) -> Array:
    return _on_each_platform(_PRODUCTS, precision, path, x, q)


def _forward(
    precision: Any, path: str | None, x: Array, q: QuantizedTensor
) -> tuple[Array, QuantizedTensor]:
    return _matmul(precision, path, x, q), q


def _backward(
    precision: Any, path: str | None, q: QuantizedTensor, gradient: Array
) -> tuple[Array, None]:
    # Without the barrier the compiler finds the forward pass's dense weight equal, and keeps it.
    # XLA:CPU drops barriers before it looks: there only a scan keeps the two passes apart.  What a
    # recomputed forward pass has gathered in front of it serves both.
    gradient, q = jax.lax.optimization_barrier((gradient, gathered(q)))
    return _on_each_platform(_TRANSPOSED, precision, path, gradient, q), None


_matmul.defvjp(_forward, _backward)


# How `platform_dependent` calls what `explain` calls a backend.
_BACKENDS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


def _on_each_platform(
    products: Any, precision: Any, path: str | None, x: Array, q: QuantizedTensor
) -> Array:
    """`products` on the path given, or on the one of the platform this is compiled for."""
    q = gathered(q)
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], q.d_in), x.dtype)
    paths = {b: path or explain(shape, q, backend=_BACKENDS[b]).name for b in _BACKENDS}
    elsewhere = functools.partial(products[paths.pop("cpu")], precision)
    special = {b: functools.partial(products[name], precision) for b, name in paths.items()}
    if all(branch.func is elsewhere.func for branch in special.values()):
        return elsewhere(x, q)
    return jax.lax.platform_dependent(x, q, **special, default=elsewhere)


def _dense(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    return jnp.matmul(x, matrix(q, x.dtype), precision=precision)


def _dense_transposed(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    return jnp.matmul(x, matrix(q, x.dtype).T, precision=precision)


def _parts(q: QuantizedTensor, dtype: Any) -> list[Array]:
    """The rows `(G, u, d_out)` of each part of a byte."""
    per_row = absmax(q)[..., None, :]
    return [(part * per_row).astype(dtype) for part in block_values(q)]


def _split(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    parts = _parts(q, x.dtype)
    blocks, rows, _ = parts[0].shape
    padding = [(0, 0)] * (x.ndim - 1) + [(0, blocks * len(parts) * rows - q.d_in)]
    inputs = jnp.pad(x, padding).reshape(*x.shape[:-1], blocks, len(parts), rows)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = [
        jnp.einsum(
            "...gu,guo->...o",
            inputs[..., i, :],
            part,
            precision=precision,
            preferred_element_type=wide,
        )
        for i, part in enumerate(parts)
    ]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _split_transposed(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    products = [
        jnp.einsum("...o,guo->...gu", x, part, precision=precision) for part in _parts(q, x.dtype)
    ]
    return jnp.stack(products, axis=-2).reshape(*x.shape[:-1], -1)[..., : q.d_in]


def _slab(q: QuantizedTensor, scales: Array, i: Array, slabs: int, dtype: Any) -> Array:
    """The dense columns of slab i of a kernel whose absmax are `scales`, as `_by_slab` has them."""

    def cut(x: Any) -> Any:
        part = jax.lax.dynamic_index_in_dim(_by_slab(q, x, slabs), i, axis=-2, keepdims=False)
        return part.reshape(*part.shape[:-2], -1)

    part = dataclasses.replace(
        q,
        codes=cut(q.codes),
        scales=cut(scales),
        zeros=None if q.zeros is None else cut(q.zeros),
        nested_scales=None,
        offset=None,
        kernel_shape=(q.d_in, q.d_out // slabs),
        contracting=(0,),
    )
    return matrix(part, dtype)


def _by_slab(q: QuantizedTensor, x: Array, slabs: int) -> Array:
    """Columns `(..., d_out)` as (devices, slabs, columns): each slab has some of each device's."""
    return x.reshape(*x.shape[:-1], cuts_in_use(q)[1], slabs, -1)


def _slabs(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    slabs, devices = _slab_count(q, _dense_bytes(q, x.dtype)), cuts_in_use(q)[1]
    scales = absmax(q)

    def product(i: Array) -> Array:
        y = jnp.matmul(x, _slab(q, scales, i, slabs, x.dtype), precision=precision)
        return y.reshape(*y.shape[:-1], devices, -1)

    y = jnp.moveaxis(jax.lax.map(product, jnp.arange(slabs)), 0, -2)
    return y.reshape(*x.shape[:-1], q.d_out)


def _slabs_transposed(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    slabs = _slab_count(q, _dense_bytes(q, x.dtype))
    scales, parts = absmax(q), _by_slab(q, x, slabs)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def add(total: Array, i: Array) -> tuple[Array, None]:
        part = jax.lax.dynamic_index_in_dim(parts, i, axis=-2, keepdims=False)
        part = part.reshape(*x.shape[:-1], -1)
        slab = _slab(q, scales, i, slabs, x.dtype)
        product = jnp.matmul(part, slab.T, precision=precision, preferred_element_type=wide)
        return total + product, None

    start = jnp.zeros((*x.shape[:-1], q.d_in), wide)
    total, _ = jax.lax.scan(add, start, jnp.arange(slabs))
    return total.astype(x.dtype)


def _kernel(precision: Any, x: Array, q: QuantizedTensor) -> Array:
    return _gpu.with_plain(_gpu.product, functools.partial(_dense, precision))(x, q)


_PRODUCTS = {"dense": _dense, "split": _split, "slabs": _slabs, "kernel": _kernel}
_TRANSPOSED = {
    "dense": _dense_transposed,
    "split": _split_transposed,
    "slabs": _slabs_transposed,
    "kernel": _dense_transposed,
}
