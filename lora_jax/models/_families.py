"""What differs between the families of decoders: the one table of it.

A family is added here: the names of its modules, the order of its norms, what its `config.json`
calls things and leaves out.  `_layers.py` and `_decoder.py` read the table; nothing else asks for
a family by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

SLIDING, FULL = "sliding_attention", "full_attention"
"""What `layer_types` calls layers that see a window, and those that see everything before."""


@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms of a block by name; None where a family has none.

    x + after_attention(attention(before_attention(x))), and so the MLP.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


_SANDWICH = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders, as far as it is not Llama.

    Modules carry the names that Hugging Face gives them.  A bias that is None here is told by the
    config (`attention_bias`, `mlp_bias`).
    """

    architecture: str
    body: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    """The table of learned positions; without one they are rotary."""
    layers: str = "layers"
    last_norm: str = "norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """One name where one kernel makes all three."""
    qkv_by_head: bool = False
    """Whether that kernel's columns hold query, key and value of one head after another."""
    out: str = "o_proj"
    qk_norm: Literal["head", "whole"] | None = None
    """Whether queries and keys have a norm each, of one head or of all heads together."""
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Gate and up; or one kernel that makes both; or no gate, if not `gated`."""
    gated: bool = True
    down: str = "down_proj"

    norm: Literal["rms", "rms_wide", "rms_offset", "layer"] = "rms"
    """RMSNorm rounded before its weight, after it, or with 1 + weight; or LayerNorm."""
    norms: Norms = Norms()
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by √hidden_size."""

    json_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fields of `ModelConfig` that `config.json` calls otherwise."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `config.json` may leave out, in the field's own terms."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that have one value whatever `config.json` says of them."""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of `config.json` that would change the numbers, and the one value that is known."""
    layer_types: Callable[[Mapping[str, Any], int], list[str]] | None = None
    """The kinds of layers where `config.json` has no list of them."""
    no_rope_layers: Callable[[Mapping[str, Any], int], list[int]] | None = None
    """Which layers have rotary positions where `config.json` does not say; None means all."""
    windows_on_request: bool = False
    """Whether windows count only with `use_sliding_window`."""
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Ends of tensors in files that are no parameters."""

    @property
    def stack(self) -> str:
        """The path whose parameters carry a leading axis of layers."""
        return f"{self.body}/{self.layers}"

    @property
    def default_targets(self) -> list[str]:
        """What an adapter is put on if nothing is said: queries and values, as in PEFT."""
        return list(dict.fromkeys((self.qkv[0], self.qkv[-1])))

    @property
    def table(self) -> str:
        """The path of the embedding."""
        return f"{self.body}/{self.embedding}/embedding"

    @property
    def head_kernel(self) -> str:
        """The path of a head that is not tied."""
        return f"{self.head}/kernel"


def _every_other(raw: Mapping[str, Any], layers: int) -> list[str]:
    return _but_every(2, layers)


def _sliding_pattern(raw: Mapping[str, Any], layers: int) -> list[str]:
    return _but_every(raw.get("sliding_window_pattern") or 6, layers)


def _but_every(n: int, layers: int) -> list[str]:
    """Windows everywhere but in every n-th layer."""
    return [FULL if (i + 1) % n == 0 else SLIDING for i in range(layers)]


def _upper_layers(raw: Mapping[str, Any], layers: int) -> list[str]:
    """Windows above the first `max_window_layers`, if at all."""
    first = raw.get("max_window_layers", 28) if raw.get("use_sliding_window") else layers
    return [FULL if i < first else SLIDING for i in range(layers)]


def _where_no_rope(raw: Mapping[str, Any], layers: int) -> list[str]:
    """Windows in the layers without rotary positions, if at all."""
    rotary = raw.get("no_rope_layers") or _but_every_fourth(raw, layers)
    windows = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
    return [SLIDING if windows and not r else FULL for r in rotary]


def _but_every_fourth(raw: Mapping[str, Any], layers: int) -> list[int]:
    """1 for layers with rotary positions; 0 for every fourth, or what the config says, without."""
    every = raw.get("no_rope_layer_interval") or 4
    return [int((i + 1) % every != 0) for i in range(layers)]


def _everywhere(raw: Mapping[str, Any], layers: int) -> list[str]:
    return [SLIDING] * layers


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA |= {"max_position_embeddings": 8192}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        layer_types=_everywhere,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        defaults=_QWEN,
        layer_types=_upper_layers,
        windows_on_request=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm="head",
        mlp_bias=False,
        defaults=_QWEN | {"head_dim": 128},
        layer_types=_upper_layers,
        windows_on_request=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        norm="rms_offset",
        mlp_bias=False,
        scaled_embedding=True,
        defaults=_GEMMA,
        only={"use_bidirectional_attention": False},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norm="rms_offset",
        norms=_SANDWICH,
        mlp_bias=False,
        scaled_embedding=True,
        json_names={"hidden_act": "hidden_activation"},
        defaults=_GEMMA
        | {
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only={"use_bidirectional_attention": False},
        layer_types=_every_other,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        norm="rms_offset",
        norms=_SANDWICH,
        qk_norm="head",
        mlp_bias=False,
        scaled_embedding=True,
        json_names={"hidden_act": "hidden_activation", "rope_local_theta": "rope_local_base_freq"},
        defaults=_GEMMA
        | {
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_theta": 1e4,
        },
        fixed={"attn_logit_softcapping": None},
        only={"use_bidirectional_attention": False},
        layer_types=_sliding_pattern,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        qkv=("qkv_proj",),
        up=("gate_up_proj",),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        layer_types=_everywhere,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
        },
        layer_types=_where_no_rope,
        no_rope_layers=_but_every_fourth,
        windows_on_request=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        norm="rms_wide",
        norms=Norms(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
        qk_norm="whole",
        mlp_bias=False,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        body="transformer",
        embedding="wte",
        positions="wpe",
        layers="h",
        last_norm="ln_f",
        attention="attn",
        qkv=("c_attn",),
        out="c_proj",
        up=("c_fc",),
        gated=False,
        down="c_proj",
        norm="layer",
        norms=Norms(before_attention="ln_1", before_mlp="ln_2"),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        json_names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        defaults={
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        body="gpt_neox",
        embedding="embed_in",
        last_norm="final_layer_norm",
        head="embed_out",
        attention="attention",
        qkv=("query_key_value",),
        qkv_by_head=True,
        out="dense",
        up=("dense_h_to_4h",),
        gated=False,
        down="dense_4h_to_h",
        norm="layer",
        mlp_bias=True,
        json_names={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
        },
        buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
}
"""By the `model_type` of `config.json`."""
