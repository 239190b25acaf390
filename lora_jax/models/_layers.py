"""The parts of a decoder block: norms, attention, MLP, as the family's table describes them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from .._typing import Array
from ._activations import ACTIVATIONS
from ._attention import attend, attend_cached
from ._cache import read, write
from ._config import ModelConfig
from ._rope import rotate

RESIDUAL, PRODUCT = "residual", "product"
"""What `checkpoint_name` calls the sum that attention joins, and products with weights."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer of a scan has of its own besides parameters; None where all are alike.

    `number`: where its keys and values stand in the cache.  `window`: how many tokens it sees.
    `rotation`: which of the rotations is its.
    """

    number: Any
    window: Any
    rotation: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a batch stand, for all layers.

    `rotations`: cosines and sines (2, batch, seq, half), behind an axis of kinds where layers
    differ; None without rotary positions.
    `mask`: (batch, 1, seq, keys), None for plain causal.  `start`: the first slot of the cache
    that is written to, () or (batch,), None without a cache.  `rows`: as in `KVCache`.
    """

    rotations: Any
    mask: Any
    start: Any
    rows: Any = None

    @property
    def fresh(self) -> bool:
        """Whether the tokens see each other alone: a mask of them alone says so."""
        return self.start is None or jnp.ndim(self.start) == 0 and _is_square(self.mask)

    def of(self, layer: Layer) -> tuple[Array | None, Array | None]:
        """A layer's own rotation and mask."""
        rotation, mask = self.rotations, self.mask
        if rotation is not None and layer.rotation is not None:
            rotation = jax.lax.dynamic_index_in_dim(rotation, layer.rotation, keepdims=False)
        if mask is not None and layer.window is not None:
            seq, keys = mask.shape[-2:]
            slots = (
                jnp.arange(seq) + jnp.asarray(0 if self.start is None else self.start)[..., None]
            )
            near = slots[..., None] - jnp.arange(keys) < layer.window
            mask = mask & jnp.expand_dims(near, -3)
        return rotation, mask


def _is_square(mask: Array | None) -> bool:
    return mask is None or mask.shape[-1] == mask.shape[-2]


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016), in float32."""

    eps: float
    kind: str = "rms"

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        offset = self.kind == "rms_offset"
        initializer = nn.initializers.zeros if offset else nn.initializers.ones
        weight = self.param("weight", initializer, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            x32 = _unit(x32 - jnp.mean(x32, axis=-1, keepdims=True), self.eps)
            return (x32 * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
        x32 = _unit(x32, self.eps)
        if self.kind == "rms":  # rounded first, as Llama was trained
            return x32.astype(x.dtype) * weight.astype(x.dtype)
        return (x32 * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def _unit(x: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: ModelConfig
    dtype: Any = jnp.float32
    fused: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d"],
        places: Places,
        layer: Layer,
        cache: tuple[Any, Any] | None,
    ) -> tuple[Float[Array, "batch seq d"], tuple[Any, Any] | None]:
        """`cache` holds all layers' keys and values; new ones are written into the layer's."""
        c, family = self.config, self.config.family
        rotation, mask = places.of(layer)
        query, key, value = self._queries_keys_values(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        how: dict[str, Any] = dict(scale=scale, cap=c.attn_logit_softcapping)
        if cache is not None:
            at = (layer.number, places.start, places.rows)
            cache = (write(cache[0], key, *at, turned=True), write(cache[1], value, *at))
        if cache is None or mask is None or places.fresh:
            out = attend(query, key, value, mask, fused=self.fused, **how)
        else:
            seen = (layer.number, self.dtype, mask.shape[-1], places.rows)
            key, value = read(cache[0], *seen, turned=True), read(cache[1], *seen)
            out = attend_cached(query, key, value, mask, **how)
        bias = c.attention_bias if family.out_bias is None else family.out_bias
        return self._dense(family.out, c.hidden_size, bias, out.reshape(*x.shape[:2], -1)), cache

    def _queries_keys_values(self, x: Array) -> tuple[Array, ...]:
        """Each (batch, seq, heads, head_dim)."""
        c, family = self.config, self.config.family
        bias = c.attention_bias if family.qkv_bias is None else family.qkv_bias
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)

        def parted(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, c.head_dim)

        if family.qkv_by_head:
            made = self._dense(family.qkv[0], sum(heads) * c.head_dim, bias, x)
            by_head = made.reshape(*x.shape[:2], c.num_attention_heads, 3, c.head_dim)
            return by_head[:, :, :, 0], by_head[:, :, :, 1], by_head[:, :, :, 2]
        if len(family.qkv) == 1:
            made = parted(self._dense(family.qkv[0], sum(heads) * c.head_dim, bias, x))
            borders = (heads[0], heads[0] + heads[1])
            return tuple(jnp.split(made, borders, axis=2))
        products = [
            self._dense(name, n * c.head_dim, bias, x)
            for name, n in zip(family.qkv, heads, strict=True)
        ]
        whole = family.qk_norm == "whole"
        normed = self._normed(products) if whole else products
        query, key, value = (parted(y) for y in normed)
        return tuple(self._normed([query, key, value])) if family.qk_norm == "head" else (
            query, key, value
        )  # fmt: skip

    def _normed(self, qkv: list[Array]) -> list[Array]:
        c = self.config
        norms = (Norm(c.rms_norm_eps, c.family.norm, name=name) for name in ("q_norm", "k_norm"))
        return [*(norm(y) for norm, y in zip(norms, qkv[:2], strict=True)), qkv[2]]

    def _dense(self, name: str, features: int, bias: bool, x: Array) -> Array:
        layer = nn.Dense(features, use_bias=bias, dtype=self.dtype, name=name)
        return checkpoint_name(layer(x), PRODUCT)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6), or down(act(up(x)))."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        c, family = self.config, self.config.family
        bias = c.mlp_bias if family.mlp_bias is None else family.mlp_bias

        def dense(name: str, features: int, x: Array) -> Array:
            layer = nn.Dense(features, use_bias=bias, dtype=self.dtype, name=name)
            return checkpoint_name(layer(x), PRODUCT)

        both = family.gated and len(family.up) == 1
        width = c.intermediate_size * (2 if both else 1)
        made = [dense(name, width, x) for name in family.up]
        if both:
            made = jnp.split(made[0], 2, axis=-1)
        return dense(family.down, c.hidden_size, _activated(ACTIVATIONS[c.hidden_act], *made))


# Inside a scan over layers XLA cannot merge the recomputation away: no barrier is needed.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _activated(act: Callable[[Array], Array], gate: Array, up: Array | None = None) -> Array:
    """act(gate)·up, whose gradient takes the two alone: they are half of what a layer keeps."""
    return act(gate) if up is None else act(gate) * up
