"""A weight in four or eight bits, as a pytree that Flax modules read like a dense one."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import Float

from .._errors import InputError
from .._mesh_axes import mesh_size
from .._tree import tree_bytes
from .._typing import Array
from . import _gpu
from ._codebook import GROUP, dynamic_values, lookup, unpack


class ReadAsArray(InputError):
    """A quantized or adapted parameter is computed with by what knows only arrays."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "nested_scales", "offset"],
    meta_fields=["format", "block_size", "kernel_shape", "contracting", "dtype", "flat", "in_use"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor(meta.AxisMetadata[Any]):
    """A kernel in blocks of 4- or 8-bit codes; `quantize` makes one, `dequantize` reads it.

    A kernel is flattened to a matrix `(d_in, d_out)` and padded with zeros to G blocks of b
    rows. Under 4 bits a byte holds row i and row i + b/2 of one block:

        W[g·b + h·b/2 + i, o] = value(nibble h of codes[g, i, o]) · absmax[g, o]

    so that it can be cut between any two blocks, or any two columns, together with its scales.
    The value is the codebook's for nf4, fp4 and int4, `(code - zero) / 15` with a zero point
    (the scale is then a block's range), and `code / 127` for int8.

    As `flax.core.meta.AxisMetadata` it may stand where a module expects a dense parameter:
    `self.param` unboxes it when it is read, so inside a scanned and rematerialized body one
    layer at a time is dense. `meta.unbox(tree)` makes the whole tree dense.

    Args:
        codes: uint8 `(*stack, G, b/2, d_out)`, high nibbles first; int8 `(*stack, G, b, d_out)`.
        scales: `(*stack, G, d_out)`: float32 or bfloat16 absmax, or uint8 codes of it (double
            quantization).
        zeros: uint8 `(*stack, G, d_out)`, the code that means zero; None without zero points.
        nested_scales: float32 `(*stack, groups)`, absmax of 256 centred absmax values in the
            order (d_out, block); None without double quantization.
        offset: float32 `(*stack,)`, the mean absmax of a matrix; None likewise.
        format: `"nf4"`, `"fp4"`, `"int4"` or `"int8"`.
        block_size: b, rows that share one absmax; a kernel of fewer rows is one block.
        kernel_shape: Shape of one dense kernel, without stack axes.
        contracting: The axes of `kernel_shape` that make up d_in, in order.
        dtype: Dtype of the dense kernel.
        flat: Blocks run on from one column into the next, as bitsandbytes cuts a weight whose
            d_in no block divides. The matrix above is then `(b, all blocks)`, one block in each
            column.
        in_use: Mesh axes by which the blocks and the columns stay cut while a layer computes; what
            the kernel is cut by besides is gathered first, as codes. None leaves all of that to
            the compiler, which gathers what is dense.

    Example:
        >>> from lora_jax.quant import quantize
        >>> q = quantize(jnp.ones((2, 128, 8), jnp.bfloat16), stacked=1)
        >>> q.shape, q.codes.shape, q.unbox().dtype
        ((2, 128, 8), (2, 2, 32, 8), dtype(bfloat16))
    """

    # Transformations rebuild pytrees with tracers, shapes, None or bare objects for children.
    codes: Any
    scales: Any
    zeros: Any
    nested_scales: Any
    offset: Any
    format: str
    block_size: int
    kernel_shape: tuple[int, ...]
    contracting: tuple[int, ...]
    dtype: np.dtype
    flat: bool = False
    in_use: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, stack axes first."""
        return (*self.codes.shape[:-3], *self.kernel_shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the dense weight."""
        return len(self.shape)

    @property
    def d_in(self) -> int:
        """Rows of the flattened kernel, padding excluded."""
        return math.prod(self.kernel_shape[axis] for axis in self.contracting)

    @property
    def d_out(self) -> int:
        """Columns of the flattened kernel."""
        return math.prod(self.kernel_shape) // self.d_in

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept."""
        return tree_bytes(self)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None) and self.shape
        double = ", double_quant" if self.nested_scales is not None else ""
        return (
            f"QuantizedTensor({self.format}, shape={shape}, block_size={self.block_size}{double},"
            f" {jnp.dtype(self.dtype).name})"
        )

    def __jax_array__(self) -> Any:
        raise ReadAsArray(
            f"a weight in {self.format} {self.shape} is used as an array; let lora_linen or"
            " lora_nnx wrap the model, read it by self.param, or call dequantize"
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__jax_array__()

    def unbox(self) -> Any:
        """The dense weight in its own shape and dtype."""
        return dequantize(self)

    @property
    def T(self) -> Any:
        """The dense weight's transpose, for a head that takes a table out of another module."""
        return self.unbox().T

    def replace_boxed(self, val: Any) -> Any:
        """The new value itself: what replaces a frozen weight is not quantized."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedTensor":
        """Itself: stack axes are known from the arrays alone."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedTensor":
        """Itself: stack axes are known from the arrays alone."""
        return self


def dequantize(q: QuantizedTensor, dtype: Any = None) -> Float[Array, "..."]:
    """The dense weight, `value(code) · absmax` computed in float32 and rounded once.

    Args:
        q: A quantized kernel, stacked or not.
        dtype: Dtype of the result; the quantized kernel's own by default.

    Returns:
        Array of shape `q.shape`.

    Raises:
        InputError: if `dtype` is not a float type.

    Example:
        >>> from lora_jax.quant import quantize
        >>> dequantize(quantize(jnp.array([[1.0], [-0.5]])))[:, 0].tolist()
        [1.0, -0.5250730514526367]

    Source: Dettmers et al. 2023, "QLoRA", equation 6.
    """
    dtype = q.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dequantize: dtype must be a float type, got {dtype}; use float32")
    return _dequantize(q, dtype)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(q: QuantizedTensor, dtype: Any) -> Array:
    return from_matrix(q, matrix(q, dtype))


def matrix(q: QuantizedTensor, dtype: Any) -> Array:
    """The dense `(*stack, d_in, d_out)`, by a kernel where one reads it."""
    q = gathered(q)
    by_xla = functools.partial(_matrix, dtype=dtype)
    if _gpu.why_not(q, dtype):
        return by_xla(q)
    by_kernel = _gpu.with_plain(functools.partial(_gpu.dense, dtype=dtype), by_xla)
    return jax.lax.platform_dependent(q, cuda=by_kernel, default=by_xla)


def _matrix(q: QuantizedTensor, dtype: Any) -> Array:
    per_row = absmax(q)[..., None, :]
    parts = [part * per_row for part in block_values(q)]
    rows = jnp.stack(parts, axis=-3).astype(dtype)
    rows = rows.reshape(*q.codes.shape[:-3], -1, q.codes.shape[-1])
    if q.flat:
        columns = rows.swapaxes(-1, -2).reshape(*rows.shape[:-2], -1)
        columns = columns[..., : q.d_in * q.d_out]
        return columns.reshape(*rows.shape[:-2], q.d_out, q.d_in).swapaxes(-1, -2)
    return rows[..., : q.d_in, :]


def block_values(q: QuantizedTensor) -> list[Array]:
    """Float32 values before the absmax `(*stack, G, rows, d_out)`, for each part of a byte."""
    if q.format == "int8":
        return [q.codes.astype(jnp.float32) / 127]
    if q.zeros is None:
        return [lookup(nibbles, q.format) for nibbles in unpack(q.codes)]
    zeros = q.zeros.astype(jnp.float32)[..., None, :]
    return [(nibbles.astype(jnp.float32) - zeros) / 15 for nibbles in unpack(q.codes)]


def partition_specs(
    q: QuantizedTensor, rows: Any = None, columns: Any = None, stack: tuple[Any, ...] = ()
) -> QuantizedTensor:
    """How to cut a kernel over a mesh: its codes between blocks and columns, scales with them.

    The nested scales of double quantization are 0.002 bits per parameter, and their groups cross
    columns: every device keeps them whole.

    Args:
        q: The kernel.
        rows: Mesh axis (or axes) to cut the blocks of d_in by; None keeps them whole.
        columns: Mesh axis to cut d_out by.
        stack: Mesh axes of the stack axes.

    Returns:
        The same tensor with a `PartitionSpec` for each array, as `jax.tree.map` wants it beside
        a mesh.

    Raises:
        InputError: for a flat kernel, whose blocks run over columns.

    Example:
        >>> from lora_jax.quant import quantize
        >>> specs = partition_specs(quantize(jnp.ones((512, 64))), rows="fsdp")
        >>> tuple(specs.codes), tuple(specs.scales)
        (('fsdp', None, None), ('fsdp', None))
    """
    if q.flat and (rows or columns):
        raise InputError(
            "partition_specs: this kernel's blocks run over columns (flat), so it is cut nowhere;"
            " replicate it, or quantize the float weight"
        )
    spec = jax.sharding.PartitionSpec
    stack = (*stack, *[None] * (q.codes.ndim - 3 - len(stack)))
    per_block = spec(*stack, rows, columns)
    return dataclasses.replace(
        q,
        codes=spec(*stack, rows, None, columns),
        scales=per_block,
        zeros=None if q.zeros is None else per_block,
        nested_scales=None if q.nested_scales is None else spec(*stack, None),
        offset=None if q.offset is None else spec(*stack),
    )


def gathered(q: QuantizedTensor) -> QuantizedTensor:
    """The kernel as a layer computes with it: cut as `in_use` says, if a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if q.in_use is None or mesh.empty or mesh.manual_axes:
        return q
    rows, columns = q.in_use
    # Without a barrier a TPU's compiler gathers slices of the stack, in a layout of which it makes
    # a copy of the whole stack.  Others would gather once more behind a second barrier.
    q = jax.lax.platform_dependent(q, tpu=jax.lax.optimization_barrier, default=lambda q: q)
    specs = partition_specs(q, rows or None, columns or None)
    return jax.tree.map(jax.lax.with_sharding_constraint, q, specs)


def cuts_in_use(q: QuantizedTensor) -> tuple[int, int]:
    """Into how many parts the rows and the columns stay cut while a layer computes."""
    rows, columns = (mesh_size(*axes) for axes in q.in_use or ((), ()))
    return rows, columns


def look_up(q: QuantizedTensor, ids: Array, dtype: Any) -> Array:
    """Rows `(*ids, d)` of a table `(vocabulary, d)` quantized along d; no other row is dense.

    As in `jnp.take`, an id outside of the table gives NaN.
    """
    flat = ids.reshape(-1)
    inside = (flat >= -q.d_out) & (flat < q.d_out)
    wrapped = jnp.where(flat < 0, flat + q.d_out, flat)

    def take(x: Array) -> Array:
        return jnp.take(x, wrapped, axis=-1, mode="clip")

    if q.offset is None:
        scales = take(q.scales).astype(jnp.float32)
    else:
        blocks = q.scales.shape[-2]
        group = (wrapped * blocks + jnp.arange(blocks)[:, None]) // GROUP
        nested = jnp.take(q.nested_scales, group, mode="clip")
        scales = dynamic_values(take(q.scales)) * nested + q.offset
    rows = dataclasses.replace(
        q,
        codes=take(q.codes),
        scales=jnp.where(inside, scales, jnp.nan),
        zeros=None if q.zeros is None else take(q.zeros),
        nested_scales=None,
        offset=None,
        kernel_shape=(flat.size, q.d_in),
    )
    return dequantize(rows, dtype).reshape(*ids.shape, q.d_in)


def from_matrix(q: QuantizedTensor, rows: Array) -> Array:
    """`(*stack, d_in, d_out)` in the kernel's own order of axes."""
    features = tuple(i for i in range(len(q.kernel_shape)) if i not in q.contracting)
    order = (*q.contracting, *features)
    stack = rows.shape[:-2]
    kernel = rows.reshape(*stack, *(q.kernel_shape[i] for i in order))
    back = [order.index(i) + len(stack) for i in range(len(order))]
    return kernel.transpose(*range(len(stack)), *back)


def absmax(q: QuantizedTensor) -> Array:
    """Float32 absmax `(*stack, G, d_out)` of every block (with zero points, its range)."""
    if q.offset is None:
        return q.scales.astype(jnp.float32)
    return nested_absmax(q.scales, q.nested_scales, q.offset)


def nested_absmax(codes: Array, nested_scales: Array, offset: Array) -> Array:
    """Absmax from its 8-bit codes `(*stack, G, d_out)` and what stands over 256 of them."""
    *stack, blocks, d_out = codes.shape
    flat = jnp.repeat(nested_scales, GROUP, axis=-1)[..., : d_out * blocks]
    by_block = flat.reshape(*stack, d_out, blocks).swapaxes(-1, -2)
    return dynamic_values(codes) * by_block + offset[..., None, None]
