"""Adapters that others published, on random bases of their shapes: PEFT's logits and ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import combine, lora_linen
from lora_jax.adapters import load_adapter
from lora_jax.models import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.oracle

SMALL = dict(vocab_size=64, max_position_embeddings=32, eos_token_id=None, pad_token_id=0)
# What an adapter's factors do not see is made small: vocabulary, MLP, positions.
BASES = {
    "gemma3-270m_r4_qv": dict(
        model_type="gemma3_text", hidden_size=640, intermediate_size=64, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=8, **SMALL,
    ),
    "qwen25-05b_r8_qv": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=64, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, **SMALL,
    ),
    "phuongsky_gpt2": dict(
        model_type="gpt2", n_embd=768, n_inner=64, n_layer=6, n_head=12, vocab_size=64,
        n_positions=32, eos_token_id=None, pad_token_id=0,
    ),
    "gpt2_r8_cattn_cproj_faninfanout": dict(
        model_type="gpt2", n_embd=768, n_layer=12, n_head=12, vocab_size=64,
        n_positions=32, eos_token_id=None, pad_token_id=0,
    ),
    "llama32-1b_r8_qv": dict(
        model_type="llama", hidden_size=2048, intermediate_size=64, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        **SMALL,
    ),
}  # fmt: skip
LARGE = ("gpt2_r8_cattn_cproj_faninfanout", "llama32-1b_r8_qv")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in BASES],
)
def test_logits(data_dir, tmp_path, name):
    options = dict(BASES[name])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval().save_pretrained(tmp_path / "base")
    ids = np.random.default_rng(0).integers(3, 64, (1, 12))
    model = peft.PeftModel.from_pretrained(model, data_dir / "adapters" / name).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
        with model.disable_adapter():
            without = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(expected - without).max() > 3e-4 * np.abs(expected).max(), "it does something"

    base = load_pretrained(tmp_path / "base")
    adapter, _ = load_adapter(data_dir / "adapters" / name, base.params, layouts=base.layouts)
    adapted = jax.jit(lambda p, i: lora_linen(base.module).apply({"params": p}, i))
    found = adapted(combine(base.params, adapter), jnp.asarray(ids))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
