"""PEFT loads what we save and computes the same logits."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import LoraConfig, combine, init_adapter, lora_linen  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402
from lora_jax.models import load_pretrained  # noqa: E402
from tests import compiled  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
IDS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)


def theirs(model_dir, adapter_dir):
    """Logits by PEFT, and what it warned of missing or unexpected keys."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter_dir).eval()
    words = [str(w.message) for w in caught if "keys" in str(w.message)]
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy(), words


def check(model_dir, tmp_path, config):
    pretrained = load_pretrained(model_dir)
    adapter = init_adapter(jax.random.key(3), pretrained.params, config, layouts=LAYOUTS)
    if config.modules_to_save:
        adapter["lm_head"]["kernel"] = 1.5 * adapter["lm_head"]["kernel"]
    save_adapter(tmp_path / "adapter", adapter, config, layouts=LAYOUTS, base_model="base")
    params = combine(pretrained.params, adapter)
    ours = compiled.apply(lora_linen(pretrained.module), params, jnp.asarray(IDS))
    base = compiled.apply(pretrained.module, pretrained.params, jnp.asarray(IDS))
    expected, words = theirs(model_dir, tmp_path / "adapter")
    assert not words
    largest = np.abs(expected).max()
    assert np.abs(base - expected).max() > 1e-2 * largest
    assert np.abs(ours - expected).max() <= 1e-5 * largest


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ALL, "lora_alpha": 16},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"model\.layers\.[13]\.mlp\.down_proj": 11, "q_proj": 2},
            "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 20},
        },
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 4]},
        {"target_modules": "all-linear", "layers_to_transform": [0], "exclude_modules": ["k_proj"]},
        {"target_modules": r".*\.[02]\..*\.(q|up)_proj"},
        {"target_modules": ["o_proj"], "adapter_dtype": "bfloat16"},
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "lora_alpha": 6},
    ],
    ids=["all", "rslora", "patterns", "layers", "all-linear layers", "regex", "bfloat16", "dora"],
)
def test_peft_computes_the_same(data_dir, tmp_path, fields):
    config = LoraConfig(**{"r": 4, "init_lora_weights": False, **fields})
    check(data_dir / "stories260K-hf", tmp_path, config)


def random_llama(**fields):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **fields,
    )
    return transformers.LlamaForCausalLM(shape)


@pytest.mark.parametrize("copies", ["auto", True])
def test_what_peft_saves_with_an_adapted_head_is_read(tmp_path, copies):
    model = random_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=copies)
    pretrained = load_pretrained(tmp_path / "model")
    adapter, _ = load_adapter(tmp_path / "adapter", pretrained.params, layouts=LAYOUTS)
    params = combine(pretrained.params, adapter)
    ours = compiled.apply(lora_linen(pretrained.module), params, jnp.asarray(IDS))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(IDS).long()).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_what_peft_trained_from_a_start_is_read(tmp_path, init):
    """PEFT moves the base again when it loads such an adapter; here the adapter gets plain."""
    model = random_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter) * parameter.abs().mean()
    model.save_pretrained(tmp_path / "adapter")
    pretrained = load_pretrained(tmp_path / "model")
    adapter, read = load_adapter(tmp_path / "adapter", pretrained.params, layouts=LAYOUTS)
    assert read.r == (4 if init == "orthogonal" else 8)
    params = combine(pretrained.params, adapter)
    ours = compiled.apply(lora_linen(pretrained.module), params, jnp.asarray(IDS))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(IDS).long()).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_peft_trained_with_dora_is_read(tmp_path):
    model = random_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True,
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    pretrained = load_pretrained(tmp_path / "model")
    adapter, read = load_adapter(tmp_path / "adapter", pretrained.params, layouts=LAYOUTS)
    assert read.use_dora
    params = combine(pretrained.params, adapter)
    ours = compiled.apply(lora_linen(pretrained.module), params, jnp.asarray(IDS))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(IDS).long()).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_head_trained_in_full(tmp_path):
    random_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    config = LoraConfig(
        r=3, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False
    )
    check(tmp_path / "model", tmp_path, config)


def test_the_config_has_the_keys_that_peft_writes(tmp_path):
    config = LoraConfig(target_modules=["q"])
    adapter = init_adapter(jax.random.key(0), {"q": {"kernel": jnp.ones((8, 9))}}, config)
    save_adapter(tmp_path / "ours", adapter, config)
    peft.LoraConfig(target_modules=["q"], inference_mode=True).save_pretrained(tmp_path / "theirs")
    ours, written = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    assert list(ours) == sorted(written)
    assert {k for k in ours if ours[k] != written[k]} <= {"peft_version"}
