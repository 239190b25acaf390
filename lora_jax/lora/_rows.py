"""Several adapters at once, each row of a batch through one of them or through none."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.core import Tracer
from jaxtyping import Float, Int

from .._errors import InputError
from .._tree import leaves_with_path, map_with_path, tree_from_paths
from .._typing import Array, Key, Params
from ..quant import ReadAsArray
from ._convolution import Convolve
from ._dora import column_scale, scale_columns
from ._linear import base_product, convolution_delta, drop, look_up_delta, lora_delta
from ._targets import is_embedding, leaf_shape

ROWS = "lora_rows"
"""The leaf that says which slot each row of a batch goes through."""
PLAIN = -1
"""What it says of a row without an adapter."""


def choose_rows(slots: Params, rows: Int[Array, " batch"]) -> dict[str, Any]:
    """The leaves that lead each row of a batch to a slot: lay them over a base and its slots.

    They are no part of what is trained: differentiate by the slots, and give these with the base.

    Args:
        slots: Adapters stacked behind the axes of layers, as in `AdapterBank.slots`.
        rows: The slot of each row; -1 is the plain base.

    Raises:
        InputError: for a slot that is not there.

    Example:
        >>> slots = {"q": {"lora_A": jnp.ones((3, 4, 2)), "lora_scaling": jnp.ones(3)}}
        >>> choose_rows(slots, jnp.array([0, 2, -1, 0]))["q"]["lora_rows"].tolist()
        [0, 2, -1, 0]
    """
    chosen = {}
    for path, leaf in leaves_with_path(slots):
        if path.endswith("lora_scaling"):
            _check_rows(rows, leaf.shape[-1])
            # A scan over layers takes one of these for each.
            shape = (*leaf.shape[:-1], len(rows))
            name = path.removesuffix("lora_scaling") + ROWS
            chosen[name] = jnp.broadcast_to(jnp.asarray(rows, jnp.int32), shape)
    return tree_from_paths(chosen)


def _check_rows(rows: Array, slots: int) -> None:
    """Refuse slots that are not there, where the numbers are known yet."""
    if isinstance(rows, Tracer) or not rows.size:
        return
    if int(rows.min()) < PLAIN or int(rows.max()) >= slots:
        raise InputError(
            f"choose_rows: rows are slots from 0 to {slots - 1}, or {PLAIN} for the plain base; got"
            f" {rows.tolist()}"
        )


def pad_rows(params: Params, count: int) -> Params:
    """Parameters for a batch that was filled up to `count` rows: the new ones are the plain base.

    Example:
        >>> pad_rows({"q": {"lora_rows": jnp.array([1, 0])}}, 4)["q"]["lora_rows"].tolist()
        [1, 0, -1, -1]
    """

    def leaf(path: str, x: Any) -> Any:
        if not path.endswith(ROWS):
            return x
        pads = [(0, 0)] * (x.ndim - 1) + [(0, max(count - x.shape[-1], 0))]
        return jnp.pad(x, pads, constant_values=PLAIN)

    return map_with_path(leaf, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParam(meta.AxisMetadata):
    """W0, the factors of several adapters, and which of them each row of a batch uses.

    It takes the place of a `LoraParam`, in layers that know it; there is no one dense weight.
    """

    base: Any
    lora_A: Array
    lora_B: Array
    scaling: Array
    magnitude: Array | None
    dropout_key: Key | None
    dropout_rate: Array | None
    rows: Array
    path: str = dataclasses.field(metadata={"static": True})
    contracting: tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    untied: bool = dataclasses.field(default=False, metadata={"static": True})
    lora_B_bias: Array | None = None

    def unbox(self) -> Array:
        """NaN in the place of a table, since `nn.Embed` opens the box in its setup and leaves it.

        Raises:
            InputError: for any other parameter, whose module would compute with it.
        """
        if is_embedding(self.path):
            return jnp.full(leaf_shape(self.base)[0], jnp.nan, leaf_shape(self.base)[1])
        raise self._no_whole()

    @property
    def T(self) -> Array:
        """Refused: a head that takes a table out of `module.variables` knows no rows."""
        raise self._no_whole()

    def _no_whole(self) -> InputError:
        return InputError(
            f"{self.path}: rows of one batch cannot each have a weight of their own in a module"
            " that reads it as a whole; only Dense, DenseGeneral, Einsum, Conv and Embed take an"
            " adapter for each row: exclude this module"
        )

    def __jax_array__(self) -> Array:
        raise ReadAsArray(f"the adapted {self.path} is used as an array; read it by self.param")

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "RowParam":
        return dataclasses.replace(self, base=meta.add_axis(self.base, index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "RowParam":
        return dataclasses.replace(self, base=meta.remove_axis(self.base, index, params))

    def linear(self, x: Array, kernel: Any, precision: Any = None) -> Array:
        """The layer for inputs (batch, ..., d_in), with `kernel` the base as a matrix."""

        def product(x: Array) -> Array:
            return base_product(x, kernel, precision)

        few = x.shape[1:-1] == (1,) and len(self.scaling) <= 2 * len(self.rows)
        return self._sum(
            x, kernel, product, self._through_slots if few else self._by_row(lora_delta)
        )

    def convolution(self, x: Array, kernel: Array, convolve: Convolve, groups: int) -> Array:
        """The layer for inputs (batch, ..., d_in), without its bias."""

        def product(x: Array) -> Array:
            return convolve(x, kernel)

        def delta(x: Array, a: Array, b: Array, scaling: Array, *bias: Array) -> Array:
            return convolution_delta(x, a, b, scaling, convolve, groups, *bias)

        return self._sum(x, kernel, product, self._by_row(delta))

    def _by_row(self, delta: Callable) -> Callable[[Array], Array]:
        """Each row's delta, through a copy of its slot's factors."""
        biases = () if self.lora_B_bias is None else (self._of_rows(self.lora_B_bias),)
        return lambda x: jax.vmap(delta)(x, *self._factors(), *biases)

    def _through_slots(self, x: Float[Array, "batch 1 d_in"]) -> Float[Array, "batch 1 d_out"]:
        """Each row's delta, where single tokens meet few slots: each factor is read once, in place.

        Rows stand in groups, one for each slot, and two batched products take each group through
        its slot.  A processor gains by groups no larger than most are, and by none where no row
        has an adapter.
        """
        batch, slots = len(self.rows), len(self.scaling)
        own = self.rows[:, None] == jnp.arange(slots)
        rank = jnp.sum(jnp.where(own, jnp.cumsum(own, axis=0) - 1, 0), axis=1)
        few = max(2 * batch // slots, 2)
        whole, small = (functools.partial(self._grouped, room, rank) for room in (batch, few))
        if few >= batch or jax.default_backend() != "cpu":
            return whole(x)
        most = jnp.max(jnp.sum(own, axis=0))
        return jax.lax.switch((most > 0) + 1 * (most > few), [self._nothing, small, whole], x)

    def _nothing(self, x: Array) -> Array:
        return jnp.zeros((*x.shape[:-1], self.lora_B.shape[-1]), x.dtype)

    def _grouped(self, room: int, rank: Array, x: Array) -> Array:
        """`_through_slots` where at most `room` rows go through one; `rank` numbers these."""
        slots = len(self.scaling)
        place = jnp.where(self.rows == PLAIN, slots * room, self.rows * room + rank)
        taken = jnp.arange(slots * room)[:, None] == place
        # Selects, since another's number times zero may be no number.
        groups = jnp.where(jnp.any(taken, axis=1)[:, None], x[jnp.argmax(taken, axis=1), 0], 0)
        groups = groups.reshape(slots, room, -1)
        a, b = self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)
        scaling = jax.lax.stop_gradient(self.scaling.astype(jnp.float32))[:, None, None]
        thin = jnp.einsum("ngd,ndr->ngr", groups, a, preferred_element_type=jnp.float32)
        delta = jnp.einsum("ngr,nro->ngo", (scaling * thin).astype(x.dtype), b)
        if self.lora_B_bias is not None:
            bias = self.lora_B_bias.astype(jnp.float32)[:, None]
            delta = delta + (scaling * bias).astype(x.dtype)
        delta = delta.reshape(slots * room, -1).at[place].get(mode="fill", fill_value=0)
        return delta[:, None]

    def _sum(self, x: Array, kernel: Any, product: Callable, deltas_of: Callable) -> Array:
        """A layer's product, and for each row its own delta."""
        self._check_batch(x)
        base, dropped = product(x), self._dropped(x)
        deltas = deltas_of(dropped)
        if self.magnitude is None:
            return base + deltas
        if self.dropout_key is None:
            return self.scaled(base + deltas, kernel)
        c = self._spread(self._column_scales(kernel), base)
        return (base + (c - 1) * product(dropped) + c * deltas).astype(base.dtype)

    def look_up(self, ids: Array, rows: Array, table: Any) -> Array:
        """What an embedding gives for ids (batch, ...), with `rows` what its table gives."""
        self._check_batch(ids)
        a, b, scaling = self._factors()
        delta = jax.vmap(look_up_delta)(ids, a.astype(rows.dtype), b.astype(rows.dtype), scaling)
        return self.scaled(rows + delta, table)

    def scaled(self, x: Array, kernel: Any) -> Array:
        """x (batch, ..., d_out) with each column's scale, where there are magnitudes."""
        if self.magnitude is None:
            return x
        return jax.vmap(scale_columns)(x, self._column_scales(kernel))

    def transposed(self, x: Array) -> Array:
        """The delta of y = x·Wᵀ, as a tied head has it."""
        self._check_batch(x)
        a, b, scaling = self._factors()
        return jax.vmap(lora_delta)(self._dropped(x), b.mT, a.mT, scaling)

    def _factors(self) -> tuple[Array, Array, Array]:
        return self._of_rows(self.lora_A), self._of_rows(self.lora_B), self._scalings()

    def _scalings(self) -> Float[Array, " batch"]:
        return jnp.where(self.rows == PLAIN, 0.0, self._of_rows(self.scaling))

    def _of_rows(self, of_slots: Array) -> Array:
        return jnp.take(of_slots, jnp.maximum(self.rows, 0), axis=0)

    def _column_scales(self, kernel: Any) -> Float[Array, "batch d_out"]:
        """Each row's magnitude / ‖W0 + scaling·A·B‖, and 1 where its slot has no magnitude."""
        assert self.magnitude is not None
        factors = (self.lora_A, self.lora_B, self.scaling, self.magnitude)
        scales = jax.vmap(lambda *own: column_scale(kernel, *own))(*factors)
        with_magnitude = jnp.any(self.magnitude != 0, axis=-1, keepdims=True)
        of_rows = self._of_rows(jnp.where(with_magnitude, scales, 1.0))
        return jnp.where((self.rows == PLAIN)[:, None], 1.0, of_rows)

    def _dropped(self, x: Array) -> Array:
        """x with each row's own entries dropped."""
        if self.dropout_key is None or self.dropout_rate is None:
            return x
        numbers = jnp.arange(len(self.rows))
        keys = jax.vmap(jax.random.fold_in)(self._of_rows(self.dropout_key), numbers)
        return jax.vmap(drop)(x, keys, self._of_rows(self.dropout_rate))

    def _spread(self, of_rows: Array, x: Array) -> Array:
        """(batch, d) to the axes of x."""
        return of_rows.reshape(len(of_rows), *[1] * (x.ndim - 2), -1)

    def _check_batch(self, x: Array) -> None:
        if x.ndim < 2 and not jnp.issubdtype(x.dtype, jnp.integer) or len(x) != len(self.rows):
            raise InputError(
                f"{self.path}: an adapter was chosen for each of {len(self.rows)} rows, but its"
                f" input has shape {x.shape}; the first axis has to be the batch's"
            )
