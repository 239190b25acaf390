"""The parts of a decoder block: RMSNorm, rotary positions, attention, gated MLP."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from .._typing import Array
from ._attention import attend
from ._config import ModelConfig
from ._rope import rotate

RESIDUAL, PRODUCT = "residual", "product"
"""What `checkpoint_name` calls the sum that attention joins, and products with weights."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values already computed, for all layers.

    `key`, `value`: (layers, batch, capacity, kv_heads, head_dim).  `segment_ids`:
    (batch, capacity), 0 where a slot is empty or padding.  `length`: slots in use, ().
    """

    key: Array
    value: Array
    segment_ids: Array
    length: Array


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * weight.astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: ModelConfig
    dtype: Any = jnp.float32
    fused: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d"],
        angles: Float[Array, "batch seq half"],
        mask: Bool[Array, "batch 1 seq keys"] | None,
        cache: tuple[Array, Array] | None,
        where: tuple[Array, Array | None],
    ) -> tuple[Float[Array, "batch seq d"], tuple[Array, Array] | None]:
        """`mask` None means plain causal; `cache` holds all layers' keys and values, and new
        ones are written to the layer and from the slot that `where` tells."""
        c = self.config
        batch, seq, _ = x.shape

        def project(name: str, heads: int) -> Array:
            dense = nn.Dense(
                heads * c.head_dim, use_bias=c.attention_bias, dtype=self.dtype, name=name
            )
            product = checkpoint_name(dense(x), PRODUCT)
            return product.reshape(batch, seq, heads, c.head_dim)

        query = rotate(project("q_proj", c.num_attention_heads), angles)
        key = rotate(project("k_proj", c.num_key_value_heads), angles)
        value = project("v_proj", c.num_key_value_heads)
        if cache is not None:
            cache = (_written(cache[0], key, where), _written(cache[1], value, where))
            key, value = (
                jax.lax.dynamic_index_in_dim(filled, where[0], keepdims=False) for filled in cache
            )
        out = attend(query, key, value, mask, fused=self.fused).reshape(batch, seq, -1)
        o_proj = nn.Dense(c.hidden_size, use_bias=c.attention_bias, dtype=self.dtype, name="o_proj")
        return checkpoint_name(o_proj(out), PRODUCT), cache


def _written(cache: Array, new: Array, where: tuple[Array, Any]) -> Array:
    """The cache of all layers with one layer's new keys or values in their slots."""
    layer, start = where
    return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, start, 0, 0))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        c = self.config

        def dense(name: str, features: int, x: Array) -> Array:
            layer = nn.Dense(features, use_bias=c.mlp_bias, dtype=self.dtype, name=name)
            return checkpoint_name(layer(x), PRODUCT)

        gate = dense("gate_proj", c.intermediate_size, x)
        up = dense("up_proj", c.intermediate_size, x)
        return dense("down_proj", c.hidden_size, _gated(gate, up))


# Inside a scan over layers XLA cannot merge the recomputation away: no barrier is needed.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: Array, up: Array) -> Array:
    """silu(gate)·up, whose gradient takes the two alone: they are half of what a layer keeps."""
    return nn.silu(gate) * up
