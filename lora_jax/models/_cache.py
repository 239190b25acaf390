"""Keys and values that were computed before: how they are kept, added to and read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from .._errors import InputError, nearest
from .._typing import Array
from ._config import ModelConfig

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values already computed, for all layers.

    `value`: (layers, batch, kv_heads, capacity, head_dim), an array or `Int8`, or a tuple with one
    for each layer; head by head, as attention multiplies them.  `key`: the same, its last two axes
    `turned`: else a product with them would turn them for each token.  `segment_ids`:
    (batch, capacity), 0 where a slot is empty or padding.  `length`: slots in use, (); the
    number 0 of a new cache tells while tracing that there is nothing to look back at.

    Rows that come and go have lengths of their own, (batch,), and no padding.  Then `segment_ids`
    may be shorter than the capacity: later slots are not looked at.  `rows`: where in a cache of
    more rows those of the batch are, (batch,); None is all of them in order.
    """

    key: Any
    value: Any
    segment_ids: Any
    length: Any
    rows: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Vectors x = codes·scale with one scale for each: |x - codes·scale| <= max|x| / 254."""

    codes: Any
    scale: Any


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    Args:
        config: The model's shape.
        batch: Rows.
        capacity: Tokens of a row, padding included.
        dtype: Of what is kept; int8 keeps a float32 scale beside each head's vector.

    Raises:
        InputError: for another dtype.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> cache = init_cache(config, 1, 16, jnp.float32)
        >>> cache.key.shape, cache.value.shape
        ((2, 1, 4, 8, 16), (2, 1, 4, 16, 8))
    """
    name = dtype_name(dtype)
    heads = (config.num_hidden_layers, batch, config.num_key_value_heads)

    def empty(*shape: int) -> Any:
        values = jnp.zeros((*heads, *shape), name)
        return Int8(values, jnp.zeros((*heads, capacity))) if name == "int8" else values

    keys, values = empty(config.head_dim, capacity), empty(capacity, config.head_dim)
    return KVCache(keys, values, jnp.zeros((batch, capacity), jnp.int32), 0)


def dtype_name(dtype: Any) -> str:
    """The name of a type that a cache may have.

    Raises:
        InputError: for another.

    Example:
        >>> dtype_name(jnp.bfloat16), dtype_name("int8")
        ('bfloat16', 'int8')
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in CACHE_DTYPES:
        raise InputError(
            f"cache_dtype: unknown {name!r}{nearest(name, CACHE_DTYPES)}; known:"
            f" {', '.join(CACHE_DTYPES)}"
        )
    return name


def by_layer(cache: KVCache) -> KVCache:
    """The same with an array of its own for each layer."""
    count = len(jax.tree.leaves(cache.key)[0])

    def parts(kept: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda x, at=at: x[at], kept) for at in range(count))

    return dataclasses.replace(cache, key=parts(cache.key), value=parts(cache.value))


def write(
    kept: Any,
    new: Float[Array, "batch seq kv_heads d"],
    layer: Array | int,
    start: Array | int,
    rows: Int[Array, " batch"] | None = None,
    *,
    turned: bool = False,
) -> Any:
    """All layers' keys or values, with new ones in one layer's slots from `start` on.

    With a start for each row they go to `rows`, and what has no slot is dropped.  Keys are
    `turned`, as in `KVCache`.
    """
    if isinstance(kept, tuple):
        own = jax.tree.map(lambda x: x[None], kept[layer])
        own = jax.tree.map(lambda x: x[0], write(own, new, 0, start, rows, turned=turned))
        return (*kept[:layer], own, *kept[layer + 1 :])
    coded = encode(new) if isinstance(kept, Int8) else new
    if jnp.ndim(start) == 1:
        return _write_rows(kept, coded, layer, jnp.asarray(start), rows, turned)

    def put(whole: Array, own: Array) -> Array:
        own = jnp.moveaxis(own, 1, -1 if turned or own.ndim == 3 else 2)
        at = [layer, *[0] * own.ndim]
        at[-1 if turned or own.ndim == 3 else -2] = start
        return jax.lax.dynamic_update_slice(whole, own[None].astype(whole.dtype), at)

    return jax.tree.map(put, kept, coded)


def _write_rows(
    kept: Any, coded: Any, layer: Array | int, start: Array, rows: Any, turned: bool
) -> Any:
    batch, seq = jax.tree.leaves(coded)[0].shape[:2]
    numbers = jnp.arange(batch) if rows is None else rows
    slots = start[:, None] + jnp.arange(seq)

    def put(whole: Array, own: Array) -> Array:
        between = (slice(None),) * (2 if turned and own.ndim == 4 else 1)
        at = whole.at[(layer, numbers[:, None], *between, slots)]
        return at.set(own.astype(whole.dtype), mode="drop")

    return jax.tree.map(put, kept, coded)


def read(
    kept: Any,
    layer: Array | int,
    dtype: Any,
    keys: int | None = None,
    rows: Int[Array, " batch"] | None = None,
    *,
    turned: bool = False,
) -> Float[Array, "batch kv_heads keys d"]:
    """One layer's keys or values: of all slots or the first, of all rows or some."""
    if isinstance(kept, tuple):
        own = kept[layer]
    else:
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), kept)
    if rows is not None:
        # XLA on CPUs would otherwise write once more, into each thing that reads.
        own = jax.tree.map(lambda x: x[rows], jax.lax.optimization_barrier(own))
    codes, scale = (own.codes, own.scale) if isinstance(own, Int8) else (own, None)
    # Nothing moves: a product takes them as they lie.
    codes = jnp.swapaxes(codes[..., :keys], -1, -2) if turned else codes[:, :, :keys]
    if scale is None:
        return codes.astype(dtype)
    return (codes.astype(jnp.float32) * scale[:, :, :keys, None]).astype(dtype)


def encode(x: Float[Array, "... d"]) -> Int8:
    """Round each vector to whole multiples of its largest entry / 127.

    Example:
        >>> coded = encode(jnp.array([1.0, -2.0, 0.5]))
        >>> coded.codes.tolist(), round(float(coded.scale) * 127, 6)
        ([64, -127, 32], 2.0)
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=-1) / 127
    codes = jnp.round(x32 / jnp.where(scale == 0, 1, scale)[..., None])
    return Int8(codes.astype(jnp.int8), scale)
