"""One decoder for the Llama family: an ordinary Linen module, its layers under `nn.scan`.

Parameter paths are Hugging Face's module names (`model/layers/self_attn/q_proj`), with
the layers stacked along a leading axis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from .._errors import InputError, nearest
from .._typing import Array
from ._attention import NAME as ATTENTION
from ._config import ModelConfig
from ._layers import MLP, PRODUCT, RESIDUAL, Attention, KVCache, RMSNorm
from ._rope import rope_angles

STACKED = "model/layers"
"""The path whose parameters carry a leading layer axis."""

INPUT_NAME = "layer_input"

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
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    dtype: Any = jnp.float32
    fused_attention: bool = True

    @nn.compact
    def __call__(self, carry, layer, angles, mask, start):
        c = self.config
        x, cache = carry
        # Named inside the scanned body: a stack of carries cannot be sent to the host.
        x = checkpoint_name(x, INPUT_NAME)
        norm = RMSNorm(c.rms_norm_eps, name="input_layernorm")
        attended, cache = Attention(c, self.dtype, self.fused_attention, name="self_attn")(
            norm(x), angles, mask, cache, (layer, start)
        )
        x = checkpoint_name(x + attended, "residual")
        norm = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")
        return (x + MLP(c, self.dtype, name="mlp")(norm(x)), cache), None


class Decoder(nn.Module):
    """Embedding, scanned blocks and the final norm."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "everything"
    fused_attention: bool = True

    def setup(self) -> None:
        c = self.config
        if self.remat not in REMAT_POLICIES:
            raise InputError(
                f"remat: unknown policy {self.remat!r}{nearest(self.remat, REMAT_POLICIES)};"
                f" known: {', '.join(REMAT_POLICIES)}"
            )
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype)
        block = Block
        if self.remat != "everything":
            # Inside scan XLA cannot merge the recomputation away, so prevent_cse only costs.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=c.num_hidden_layers,
        )(c, self.dtype, self.fused_attention)
        self.norm = RMSNorm(c.rms_norm_eps)

    def __call__(self, input_ids, positions, mask, cache: KVCache | None) -> tuple[Array, Any]:
        c = self.config
        angles = rope_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        # The cache is carried whole and written to in place; as an input of each layer and its
        # output, every layer's part would be copied twice for each token.
        filled = None if cache is None else (cache.key, cache.value)
        start = None if cache is None else cache.length
        layers = jnp.arange(c.num_hidden_layers)
        carry = (self.embed_tokens(input_ids), filled)
        (x, filled), _ = self.layers(carry, layers, angles, mask, start)
        return self.norm(x), filled


class CausalLM(nn.Module):
    """A decoder with a head: token ids to logits.

    Args:
        config: The model's shape.
        dtype: Type of the activations; parameters keep their own.
        remat: One of `REMAT_POLICIES`.
        fused_attention: Whether cuDNN may compute attention (`attend`): False under `jax.vmap`.

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

    def setup(self) -> None:
        self.model = Decoder(self.config, self.dtype, self.remat, self.fused_attention)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False, dtype=self.dtype)

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
            start = 0 if cache is None else cache.length
            positions = jnp.broadcast_to(start + jnp.arange(seq), (batch, seq))
        if cache is None:
            mask = None if segment_ids is None else causal_mask(segment_ids, segment_ids, 0)
            return self.model(input_ids, positions, mask, None)[0], None
        if segment_ids is None:
            segment_ids = jnp.ones((batch, seq), jnp.int32)
        segments = jax.lax.dynamic_update_slice_in_dim(
            cache.segment_ids, segment_ids.astype(jnp.int32), cache.length, axis=1
        )
        mask = causal_mask(segment_ids, segments, cache.length)
        hidden, layers = self.model(input_ids, positions, mask, cache)
        return hidden, KVCache(layers[0], layers[1], segments, cache.length + seq)

    def logits(self, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        """The head applied to hidden states."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(hidden)
        return self.lm_head(hidden)


def causal_mask(
    query_segments: Int[Array, "batch seq"], key_segments: Int[Array, "batch keys"], start
) -> Bool[Array, "batch 1 seq keys"]:
    """True where a query (at slot `start` + i) may see a key: not later, and its own segment.

    A padding query sees padding, itself included, so that its softmax stays finite.
    """
    slots = start + jnp.arange(query_segments.shape[1])
    earlier = jnp.arange(key_segments.shape[1]) <= slots[:, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (earlier & same)[:, None]


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> init_cache(config, 1, 16, jnp.float32).key.shape
        (2, 1, 16, 4, 8)
    """
    shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
    return KVCache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
