"""Small random models of every family, with every feature that their configs know."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.models import Pretrained, load_pretrained

VOCABULARY = 96
_SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
_LONG = [1.0, 2.0, 4.0]


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return dict(rope_type=kind, rope_theta=1e4, **options)


MODELS: dict[str, dict[str, Any]] = {
    "llama-linear": dict(
        model_type="llama", attention_bias=True, mlp_bias=True,
        rope_parameters=_rope("linear", factor=2.0),
    ),
    "llama-dynamic": dict(
        model_type="llama", max_position_embeddings=16,
        rope_parameters=_rope("dynamic", factor=8.0),
    ),
    "llama-yarn": dict(
        model_type="llama",
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral": dict(model_type="mistral", sliding_window=8, head_dim=16),
    "qwen2": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(model_type="qwen3", head_dim=16, attention_bias=True),
    "gemma": dict(model_type="gemma", num_key_value_heads=1, head_dim=16),
    "gemma2": dict(
        model_type="gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0, final_logit_softcapping=6.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text", num_hidden_layers=5, head_dim=16, sliding_window=8,
        sliding_window_pattern=3, query_pre_attn_scalar=24,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
    "phi3": dict(model_type="phi3", sliding_window=8),
    "phi4": dict(
        model_type="phi3", tie_word_embeddings=True, original_max_position_embeddings=96,
        rope_parameters=_rope(
            "longrope", partial_rotary_factor=0.5, short_factor=[1.0, 1.2, 1.5], long_factor=_LONG
        ),
    ),
    "smollm3": dict(
        model_type="smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8
    ),
    "olmo2": dict(model_type="olmo2", attention_bias=True),
    "gpt2": dict(
        model_type="gpt2", n_positions=128, n_embd=48, n_layer=3, n_head=4,
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "pythia": dict(model_type="gpt_neox", rotary_pct=0.5),
    "neox-one-after-another": dict(
        model_type="gpt_neox", rotary_pct=0.5, use_parallel_residual=False, attention_bias=False
    ),
}  # fmt: skip


@functools.cache
def theirs(name: str) -> Any:
    """A model of transformers with weights large enough for uneven logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(MODELS[name])
    kind = options.pop("model_type")
    if kind != "gpt2":
        options = _SHAPE | options
    if kind == "gpt_neox":
        del options["num_key_value_heads"]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for path, weight in model.named_parameters():
        is_scale = weight.ndim == 1 and path.endswith("weight") and "gemma" not in kind
        torch.nn.init.normal_(weight.data, float(is_scale), 0.2)
    return model


@functools.cache
def saved(name: str) -> Path:
    """The directory it was saved to, which the process leaves to the system to clean."""
    directory = Path(tempfile.mkdtemp(prefix="lora_jax_family_"))
    theirs(name).save_pretrained(directory)
    return directory


@functools.cache
def ours(name: str) -> Pretrained:
    """The same model, loaded here."""
    return load_pretrained(saved(name))


def same_as_their_greedy(model: Any, prompts: list[list[int]], got: list[list[int]]) -> int:
    """Compare texts with transformers' for a batch padded on the left, token for token up to where
    its two best logits nearly tie; returns how many tokens were compared."""
    import torch

    length, tokens = max(map(len, prompts)), len(got[0])
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    best = torch.stack(out.scores, 1).topk(2).values
    gaps = (best[..., 0] - best[..., 1]).numpy()
    compared = 0
    for row, expected, gap in zip(got, out.sequences[:, length:].tolist(), gaps, strict=True):
        clear = int(np.argmax(gap < 1e-3)) if (gap < 1e-3).any() else len(expected)
        assert row[:clear] == expected[:clear]
        compared += clear
    return compared


def some_ids(rows: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (rows, length))


def relative(found: Any, expected: Any) -> float:
    """The largest difference over the largest expected value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@functools.cache
def forward(name: str) -> Any:
    """The jitted `(params, ids) -> logits`."""
    module = ours(name).module
    return jax.jit(lambda params, ids: module.apply({"params": params}, ids))
