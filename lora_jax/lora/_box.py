"""A parameter with its adapter in one box, which opens to the dense adapted weight."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from .._errors import InputError
from .._tree import leaves_with_path, map_with_path, partition
from .._typing import Array, Key, Params
from ..quant import QuantizedTensor, ReadAsArray, dequantize
from ._convolution import Convolve, lora_convolution
from ._dora import column_scale, dora_linear
from ._layout import Layouts, contracting_axes, matrix_shape
from ._linear import dense_delta, drop, look_up_delta, lora_delta, lora_linear
from ._rows import ROWS, RowParam
from ._targets import adapter_names, is_embedding, known_contracting, leaf_shape
from ._tied import DECODERS, mark_names
from ._tokens import token_param

_NEED_BASE = ("lora_A", "lora_B", "lora_B_bias", "lora_tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraParam(meta.AxisMetadata):
    """W0 and its factors, as one leaf of a Flax params tree.

    Layers that know it use the factored form.  Any other module reads the parameter through
    Flax, which opens the box: it then sees W0 + scaling·A·B, exact but dense.  Inside a
    scanned body only one layer is ever dense.  With a magnitude (DoRA) that sum's columns have
    that length.  A bias on B is no part of the weight: only layers can add it.
    """

    base: Any
    lora_A: Array
    lora_B: Array
    scaling: Array
    magnitude: Array | None
    dropout_key: Key | None
    dropout_rate: Array | None
    path: str = dataclasses.field(metadata={"static": True})
    contracting: tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    untied: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether an output head that shares this embedding reads it without the adapter."""
    lora_B_bias: Array | None = None

    def unbox(self) -> Array:
        """W0 + scaling·A·B in the base's dtype.

        Raises:
            InputError: under dropout or with a bias on B, which need the layer's input or
                output; or if the axes of a kernel of more than two are not known.
        """
        if self.dropout_key is not None and not is_embedding(self.path):
            raise InputError(
                f"{self.path}: lora_dropout needs a layer whose input is known (Dense,"
                " DenseGeneral, Einsum, Conv, Embed); set lora_dropout to 0 or exclude this module"
            )
        if self.lora_B_bias is not None:
            raise InputError(
                f"{self.path}: lora_bias needs a layer whose output is known (Dense, DenseGeneral,"
                " Einsum, Conv); set lora_bias to false or exclude this module"
            )
        return self.shifted(1.0)

    @property
    def T(self) -> Array:
        """The transpose, as a head has it that takes a table out of `module.variables`.

        Raises:
            InputError: as `unbox`.
        """
        if self.dropout_key is not None:
            raise InputError(
                f"{self.path}: is transposed by a module whose input is not known, and lora_dropout"
                " needs that; set lora_dropout to 0 or exclude this module"
            )
        return meta.unbox(self.base).T if self.untied else self.unbox().T

    def shifted(self, sign: float, dtype: Any = None) -> Array:
        """W0 + sign·scaling·A·B, dense and rounded once, in the base's dtype by default.

        Raises:
            InputError: if a magnitude is to be taken out again: what length the columns had is
                not known any more.
        """
        if self.magnitude is not None and sign < 0:
            raise InputError(
                f"{self.path}: a merged DoRA cannot be taken out again; keep the base instead"
            )
        shape, own = leaf_shape(self.base)
        kernel_shape = shape[self.lora_A.ndim - 2 :]
        contracting = contracting_axes(self.contracting, self.path, len(kernel_shape))
        check_shapes(dataclasses.replace(self, contracting=contracting))
        factors = (self.lora_A, self.lora_B, self.scaling, self.magnitude)
        dtype = jnp.dtype(own if dtype is None else dtype)
        return _adapted(self.base, *factors, sign, contracting, dtype)

    def shifted_bias(self, bias: Array, sign: float) -> Array:
        """b + sign·scaling·bias_B for the layer's own bias, in float32.

        The scaling belongs to it: what the layer computes is b + scaling·bias_B.  (PEFT forgets
        it where it merges into bitsandbytes' layers.)
        """
        assert self.lora_B_bias is not None
        if bias.size != self.lora_B_bias.size:
            raise InputError(
                f"{self.path}: lora_B_bias {self.lora_B_bias.shape} does not fit the layer's bias"
                f" {bias.shape}; this adapter was made for another base"
            )
        scaling = jax.lax.stop_gradient(self.scaling)[..., None]
        delta = scaling * self.lora_B_bias.astype(jnp.float32)
        return bias.astype(jnp.float32) + sign * delta.reshape(bias.shape)

    def linear(self, x: Array, kernel: Array | QuantizedTensor, precision: Any = None) -> Array:
        """The layer y = x·W for inputs (..., d_in), with `kernel` the base as a matrix."""
        layer = functools.partial(lora_linear, lora_B_bias=self.lora_B_bias)
        if self.magnitude is not None:
            layer = functools.partial(dora_linear, magnitude=self.magnitude)
        return layer(
            x,
            kernel,
            self.lora_A,
            self.lora_B,
            self.scaling,
            dropout_key=self.dropout_key,
            dropout_rate=0.0 if self.dropout_rate is None else self.dropout_rate,
            precision=precision,
        )

    def convolution(self, x: Array, kernel: Array, convolve: Convolve, groups: int) -> Array:
        """The layer y = x∗W without its bias, with `kernel` the base as a matrix."""
        return lora_convolution(
            x,
            kernel,
            self.lora_A,
            self.lora_B,
            self.scaling,
            convolve,
            groups=groups,
            magnitude=self.magnitude,
            lora_B_bias=self.lora_B_bias,
            dropout_key=self.dropout_key,
            dropout_rate=0.0 if self.dropout_rate is None else self.dropout_rate,
        )

    def look_up(self, ids: Array, rows: Array, table: Any) -> Array:
        """What an embedding gives for ids, with `rows` (..., d_out) what its table gives."""
        a, b = self.lora_A.astype(rows.dtype), self.lora_B.astype(rows.dtype)
        return self.scaled(rows + look_up_delta(ids, a, b, self.scaling), table)

    def scaled(self, x: Array, kernel: Any) -> Array:
        """x (..., d_out) with each column's scale, where there are magnitudes.

        Args:
            kernel: The base as a matrix.
        """
        if self.magnitude is None:
            return x
        factors = (self.lora_A, self.lora_B, self.scaling, self.magnitude)
        return (x * column_scale(kernel, *factors)).astype(x.dtype)

    def transposed(self, x: Array) -> Array:
        """The delta of y = x·Wᵀ, as a tied head has it."""
        rate = 0.0 if self.dropout_rate is None else self.dropout_rate
        x = drop(x, self.dropout_key, rate)
        return lora_delta(x, self.lora_B.T, self.lora_A.T, self.scaling)

    def __jax_array__(self) -> Array:
        raise ReadAsArray(f"the adapted {self.path} is used as an array; read it by self.param")

    def replace_boxed(self, val: Any) -> Any:
        """The given value: an adapted weight cannot be split into its parts again."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "LoraParam":
        return dataclasses.replace(self, base=meta.add_axis(self.base, index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "LoraParam":
        return dataclasses.replace(self, base=meta.remove_axis(self.base, index, params))


@functools.partial(jax.jit, static_argnums=(5, 6, 7), inline=True)
def _adapted(
    base: Any,
    lora_A: Array,
    lora_B: Array,
    scaling: Array,
    magnitude: Array | None,
    sign: float,
    contracting: tuple[int, ...],
    dtype: Any,
) -> Array:
    """W0 + sign·scaling·A·B, its columns as long as the magnitudes say, rounded once."""
    quantized = isinstance(base, QuantizedTensor)
    base = dequantize(base, jnp.float32) if quantized else meta.unbox(base)
    kernel_shape = base.shape[lora_A.ndim - 2 :]
    delta = dense_delta(lora_A, lora_B, scaling, kernel_shape, contracting)
    dense = base.astype(jnp.float32) + sign * delta
    if magnitude is not None:
        dense = dense * _scale_of_columns(dense, scaling, magnitude, contracting)
    return dense.astype(dtype)


def _scale_of_columns(
    dense: Array, scaling: Array, magnitude: Array, contracting: tuple[int, ...]
) -> Array:
    """What gives the columns of a dense sum their magnitudes, shaped to multiply it."""
    stack = scaling.ndim
    axes = tuple(stack + axis for axis in contracting)
    # A constant in gradients, as in `dora_linear`.
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(dense), axis=axes, keepdims=True)))
    scale = magnitude.astype(jnp.float32).reshape(norm.shape) / norm
    unadapted = (scaling == 0).reshape(scaling.shape + (1,) * (norm.ndim - stack))
    return jnp.where(unadapted, 1.0, scale)


def box_adapters(params: Params, layouts: Layouts | None = None) -> dict[str, Any]:
    """Put every parameter that has `lora_A` and `lora_B` beside it into a `LoraParam`.

    One that has `lora_tokens` beside it goes into a `TokenParam`.

    Args:
        params: A base combined with an adapter.
        layouts: Axes of adapted raw parameters that are not matrices.

    Raises:
        InputError: where an adapter's shapes do not fit the base, or it has no base at all.
    """
    leaves = dict(leaves_with_path(params))
    boxed: dict[str, Any] = {}
    used: set[str] = {mark for known in DECODERS for mark in mark_names(known.table)}
    for path, base in leaves.items():
        tokens, names = token_param(path, base, leaves)
        if tokens is not None:
            boxed[path] = tokens
            used.update(names)
        name_a, name_b, name_scaling = adapter_names(path)
        if name_a not in leaves or path in (name_a, name_b, name_scaling):
            continue
        prefix = name_a.removesuffix("lora_A")
        others = ("lora_magnitude", "lora_dropout_key", "lora_dropout_rate", "lora_B_bias", ROWS)
        parts = (name_a, name_b, name_scaling, *(prefix + name for name in others))
        if missing := [p for p in parts[:3] if p not in leaves]:
            raise InputError(f"{path}: the adapter lacks {', '.join(missing)}")
        factors: list[Any] = [leaves[part] for part in parts[:3]]
        # A look-up has no input to drop, and PEFT drops none; a head tied to it has.
        tied, untied = mark_names(path)
        drops = not is_embedding(path) or tied in leaves
        dropout = map(leaves.get, parts[4:6]) if drops else (None, None)
        contracting = known_contracting(layouts, path, base)
        factors.append(leaves.get(parts[3]))
        param = LoraParam(
            base, *factors, *dropout, path=path, contracting=contracting,
            untied=untied in leaves, lora_B_bias=leaves.get(parts[6]),
        )  # fmt: skip
        if parts[7] in leaves:
            param = row_param(param, leaves[parts[7]])
        check_shapes(param)
        boxed[path] = param
        used.update(parts)
    for path in leaves:
        if path.endswith(_NEED_BASE) and path not in used:
            raise InputError(
                f"{path}: the base has no parameter beside it; this adapter was made for"
                " another base"
            )
    bare = partition(params, used.__contains__)[1]
    return dict(map_with_path(lambda path, leaf: boxed.get(path, leaf), bare))


def row_param(param: LoraParam, rows: Array) -> RowParam:
    """The same parameter with an axis of slots, and each row's slot."""
    own = {field.name: getattr(param, field.name) for field in dataclasses.fields(param)}
    return RowParam(**own, rows=rows)


def check_shapes(param: LoraParam | RowParam) -> None:
    """Refuse factors that do not multiply to their parameter.

    Where nothing says which axes are contracted, only sizes can be compared: the layer knows,
    and checks again.
    """
    shape, _ = leaf_shape(param.base)
    slots = param.scaling.shape[-1:] if isinstance(param, RowParam) else ()
    layers = param.lora_A.ndim - 2 - len(slots)
    stack, kernel_shape = (*shape[:layers], *slots), shape[layers:]
    d_in, rank = param.lora_A.shape[-2:]
    d_out = param.lora_B.shape[-1]
    if param.contracting is None:
        fits = d_in * d_out == math.prod(kernel_shape)
    else:
        fits = matrix_shape(kernel_shape, param.contracting) == (d_in, d_out)
    quantized = isinstance(param.base, QuantizedTensor)
    if not fits and quantized and d_in * d_out == math.prod(kernel_shape):
        raise InputError(
            f"{param.path}: the adapter maps {d_in} to {d_out}, but the kernel {kernel_shape} is"
            f" quantized with contracting={param.base.contracting}; quantize it along the"
            " adapter's axes"
        )
    for name in ("magnitude", "lora_B_bias"):
        length = getattr(getattr(param, name), "shape", None)
        if length not in (None, (*stack, d_out)):
            raise InputError(
                f"{param.path}: lora_{name.removeprefix('lora_')} {length} does not fit lora_B"
                f" {param.lora_B.shape}; this adapter was made for another base"
            )
    if not fits or param.lora_B.shape[:-1] != (*stack, rank) or param.lora_A.shape[:-2] != stack:
        raise InputError(
            f"{param.path}: lora_A {param.lora_A.shape} and lora_B {param.lora_B.shape} do not fit"
            f" the base's {shape}; this adapter was made for another base"
        )
