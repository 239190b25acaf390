"""One decoder for all families: an ordinary Linen module, its layers under one `nn.scan`.

Parameter paths are Hugging Face's module names (`model/layers/self_attn/q_proj`), with
the layers stacked along a leading axis.  Layers that differ by their window or their positions
have parameters of one shape: what differs is a number that the scan brings, so that one layer is
compiled whatever their pattern.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from .._errors import InputError, nearest
from .._mesh_axes import cut
from .._typing import Array
from ._attention import NAME as ATTENTION
from ._cache import KVCache
from ._config import ModelConfig
from ._layers import MLP, PRODUCT, RESIDUAL, Attention, Layer, Norm, Places
from ._rope import rope_rotations

INPUT_NAME = "layer_input"
TOKENS = (("data", "fsdp"), "sequence")
"""Axes of the mesh that activations (batch, seq, d) are cut by between layers."""

REMAT_POLICIES = {
    "everything": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "names": jax.checkpoint_policies.save_only_these_names(ATTENTION, RESIDUAL),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT_NAME, ATTENTION, RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass keeps of a layer; whatever else it needs it computes again.

    everything   all of it: no rematerialization
    nothing      the layer's input only
    dots         the products with weights too, each once with its adapter's delta
    names        the input, attention's output and log-sum-exp, and the sum that it joins
    offload      the same four, in the host's memory
"""


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), with norms where the family's are.

    With `use_parallel_residual` both read the layer's input.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    fused_attention: bool = True

    @nn.compact
    def __call__(self, carry, layer: Layer, places: Places):
        c, family = self.config, self.config.family
        norms = family.norms

        def norm(name: str | None, x: Array) -> Array:
            return x if name is None else Norm(c.rms_norm_eps, family.norm, name=name)(x)

        x, cache = carry
        # Left open, a weight cut over the mesh would have the activations cut as it is.
        x = cut(x, *TOKENS)
        # Named inside the scanned body: a stack of carries cannot be sent to the host.
        x = checkpoint_name(x, INPUT_NAME)
        attention = Attention(c, self.dtype, self.fused_attention, name=family.attention)
        mlp = MLP(c, self.dtype, name=family.mlp)
        attended, cache = attention(norm(norms.before_attention, x), places, layer, cache)
        joined = x + norm(norms.after_attention, attended)
        joined = checkpoint_name(joined, RESIDUAL)
        source = x if c.use_parallel_residual else joined
        return (joined + norm(norms.after_mlp, mlp(norm(norms.before_mlp, source))), cache), None


class Unrolled(nn.Module):
    """Blocks one after another, each with parameters of its own: `0`, `1`, …"""

    config: ModelConfig
    dtype: Any = jnp.float32
    fused_attention: bool = True

    @nn.compact
    def __call__(self, carry, layers: Layer, places: Places):
        for number in range(self.config.num_hidden_layers):
            own = jax.tree.map(lambda x, at=number: x[at], layers)
            block = Block(self.config, self.dtype, self.fused_attention, name=str(number))
            carry, _ = block(carry, dataclasses.replace(own, number=number), places)
        return carry, None


class Decoder(nn.Module):
    """Embedding, blocks and the final norm."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "everything"
    fused_attention: bool = True
    unrolled: bool = False

    def setup(self) -> None:
        c, family = self.config, self.config.family
        if self.remat not in REMAT_POLICIES:
            raise InputError(
                f"remat: unknown policy {self.remat!r}{nearest(self.remat, REMAT_POLICIES)};"
                f" known: {', '.join(REMAT_POLICIES)}"
            )

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.hidden_size, dtype=self.dtype, name=name)

        self.embedding = table(c.vocab_size, family.embedding)
        if family.positions:
            self.learned = table(c.max_position_embeddings, family.positions)
        self.last_norm = Norm(c.rms_norm_eps, family.norm, name=family.last_norm)
        if self.unrolled:
            self.blocks = Unrolled(c, self.dtype, self.fused_attention, name=family.layers)
            return
        block = Block
        if self.remat != "everything":
            # Inside scan XLA cannot merge the recomputation away, so prevent_cse only costs.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        axes: Any = (0, nn.broadcast)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=c.num_hidden_layers,
        )(c, self.dtype, self.fused_attention, name=family.layers)

    def __call__(self, input_ids, positions, mask, cache: KVCache | None) -> tuple[Array, Any]:
        c = self.config
        layers, rotations = _layers(c), _rotations(c, positions)
        # The cache is carried whole and written to in place; as an input of each layer and its
        # output, every layer's part would be copied twice for each token.
        filled = None if cache is None else (cache.key, cache.value)
        places = Places(rotations, mask, None)
        if cache is not None:
            places = Places(rotations, mask, jnp.asarray(cache.length), cache.rows)
        x = self.embedding(input_ids)
        if c.family.scaled_embedding:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        if c.family.positions:
            x = x + self.learned(positions)
        (x, filled), _ = self.blocks((x, filled), layers, places)
        return self.last_norm(x), filled


def _layers(config: ModelConfig) -> Layer:
    """What each layer has of its own, along a leading axis."""
    everything, kinds = 2**30, _rotation_kinds(config)
    windows = config.windows
    return Layer(
        number=jnp.arange(config.num_hidden_layers),
        window=windows and jnp.asarray([w or everything for w in windows]),
        rotation=jnp.asarray(kinds) if len(set(kinds)) > 1 else None,
    )


def _rotation_kinds(config: ModelConfig) -> list[int]:
    """For each layer 0 if it turns as all do, 1 by the base of windows, 2 not at all."""
    layers = config.num_hidden_layers
    local = config.windows if config.rope_local_theta is not None else None
    kinds = [int(w is not None) for w in local] if local else [0] * layers
    rotary = config.no_rope_layers or (1,) * layers
    return [kind if turns else 2 for kind, turns in zip(kinds, rotary, strict=True)]


def _rotations(config: ModelConfig, positions: Array) -> Array | None:
    """Cosines and sines of the positions, (kinds, 2, batch, seq, half) where layers differ."""
    if config.family.positions:
        return None
    width, kinds = config.rotary_width, set(_rotation_kinds(config))
    usual = rope_rotations(positions, width, config.rope_theta, config.rope_scaling)
    if kinds == {0}:
        return usual
    local = rope_rotations(positions, width, config.rope_local_theta or config.rope_theta)
    none = rope_rotations(jnp.zeros_like(positions), width, config.rope_theta)
    every = jnp.stack([usual, local, none])
    return every if len(kinds) > 1 else every[kinds.pop()]


class CausalLM(nn.Module):
    """A decoder with a head: token ids to logits.

    Args:
        config: The model's shape.
        dtype: Type of the activations; parameters keep their own.
        remat: One of `REMAT_POLICIES`.
        fused_attention: Whether cuDNN may compute attention (`attend`): False under `jax.vmap`.
        unrolled: Whether each layer has parameters of its own and none are stacked, as
            `generate` has it on CPUs.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model, ids = CausalLM(config), jnp.ones((1, 8), jnp.int32)
        >>> params = model.init(jax.random.key(0), ids)["params"]
        >>> params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape
        (2, 32, 32)
        >>> model.apply({"params": params}, ids).shape
        (1, 8, 64)
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "everything"
    fused_attention: bool = True
    unrolled: bool = False

    def setup(self) -> None:
        c, family = self.config, self.config.family
        options = (self.dtype, self.remat, self.fused_attention, self.unrolled)
        self.body = Decoder(c, *options, name=family.body)
        if not c.tie_word_embeddings:
            self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, name=family.head)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position; see `hidden_states` for the arguments."""
        return self.logits(self.hidden_states(input_ids, positions, segment_ids)[0])

    def hidden_states(
        self,
        input_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch seq d"], KVCache | None]:
        """The last hidden states, and the cache with these tokens added if one was given.

        Args:
            input_ids: Token ids.
            positions: Rotary position of each token; counted from 0 by default.
            segment_ids: Tokens attend within their own segment only; 0 is padding.
            cache: Earlier keys and values; the tokens are appended to it.
        """
        batch, seq = input_ids.shape
        if positions is None:
            start = jnp.asarray(0 if cache is None else cache.length)
            positions = jnp.broadcast_to(start[..., None] + jnp.arange(seq), (batch, seq))
        if cache is None:
            if segment_ids is None and self.config.windows is None:
                return self.body(input_ids, positions, None, None)[0], None
            segments = jnp.ones((batch, seq), jnp.int32) if segment_ids is None else segment_ids
            mask = causal_mask(segments, segments, 0)
            return self.body(input_ids, positions, mask, None)[0], None
        if segment_ids is None:
            segment_ids = jnp.ones((batch, seq), jnp.int32)
        if jnp.ndim(cache.length) == 1:
            mask = causal_mask(segment_ids, cache.segment_ids, cache.length)
            hidden, layers = self.body(input_ids, positions, mask, cache)
            return hidden, dataclasses.replace(
                cache, key=layers[0], value=layers[1], length=cache.length + seq
            )
        segments = jax.lax.dynamic_update_slice_in_dim(
            cache.segment_ids, segment_ids.astype(jnp.int32), cache.length, axis=1
        )
        if isinstance(cache.length, int) and cache.length == 0:
            # There is nothing to look back at: tokens see each other alone.
            mask = causal_mask(segment_ids, segment_ids, 0)
        else:
            mask = causal_mask(segment_ids, segments, cache.length)
        hidden, layers = self.body(input_ids, positions, mask, cache)
        return hidden, KVCache(layers[0], layers[1], segments, jnp.int32(cache.length + seq))

    def logits(self, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        """The head applied to hidden states."""
        tied, cap = self.config.tie_word_embeddings, self.config.final_logit_softcapping
        logits = self.body.embedding.attend(hidden) if tied else self.head(hidden)
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def causal_mask(
    query_segments: Int[Array, "batch seq"], key_segments: Int[Array, "batch keys"], start
) -> Bool[Array, "batch 1 seq keys"]:
    """True where a query (at slot `start` + i) may see a key: not later, and its own segment.

    `start` is one for all, or one for each row.

    A padding query sees padding, itself included, so that its softmax stays finite.
    """
    slots = jnp.asarray(start)[..., None] + jnp.arange(query_segments.shape[1])
    earlier = jnp.arange(key_segments.shape[1]) <= slots[..., None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (earlier & same)[:, None]
