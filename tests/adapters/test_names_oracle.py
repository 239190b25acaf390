"""Names of modules in the files we write, as PEFT matches them."""

import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import LoraConfig, combine, init_adapter  # noqa: E402
from lora_jax._tree import map_with_path  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter, weighted_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
IDS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def base(biased_llama):
    return biased_llama(IDS)


def adapter_of(pretrained, seed, **fields):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields})
    made = init_adapter(jax.random.key(seed), pretrained.params, config, layouts=LAYOUTS)
    # What is trained whole is no longer the base's.
    whole = ("kernel", "scale", "lora_tokens")
    return map_with_path(lambda p, x: 1.3 * x if p.endswith(whole) else x, made), config


def assert_peft_computes_the_same(base, tmp_path, adapter, config):
    directory, pretrained, logits = base
    save_adapter(tmp_path / "adapter", adapter, config, layouts=LAYOUTS)
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert not [w for w in caught if "keys" in str(w.message)]
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS).long()).logits.numpy()
    largest = np.abs(expected).max()
    assert np.abs(logits(pretrained.params) - expected).max() > 1e-2 * largest
    for own in (adapter, load_adapter(tmp_path / "adapter", pretrained.params, layouts=LAYOUTS)[0]):
        assert np.abs(logits(combine(pretrained.params, own)) - expected).max() <= 1e-5 * largest


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["self_attn/q_proj", "model/layers/1/mlp/down_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers/0/self_attn/q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp/down_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model/embed_tokens": [5, 9]}},
        # Three norms: PEFT asks how a name ends, not which it is.
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_names_of_modules(base, tmp_path, fields):
    adapter, config = adapter_of(base[1], 0, **fields)
    assert_peft_computes_the_same(base, tmp_path, adapter, config)


def test_norms_that_peft_trained_are_read(base, tmp_path):
    directory, pretrained, logits = base
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        expected = model.eval()(torch.from_numpy(IDS).long()).logits.numpy()
    model.save_pretrained(tmp_path)
    adapter, _ = load_adapter(tmp_path, pretrained.params, layouts=LAYOUTS)
    found = logits(combine(pretrained.params, adapter))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"target_modules": r".*\.1\..*(q|up)_proj"}, id="an expression and a list"),
        pytest.param({"target_modules": ["v_proj"], "layers_to_transform": [1]}, id="some layers"),
        pytest.param({"target_modules": ["q_proj"], "lora_bias": True}, id="biases in one"),
    ],
)
def test_sums_of_adapters_of_other_modules(base, tmp_path, others):
    """PEFT reads which modules they are, and finds a bias wherever it looks for one."""
    pretrained = base[1]
    pairs = [
        adapter_of(pretrained, 0, target_modules=["q_proj", "down_proj"]),
        adapter_of(pretrained, 1, **others),
    ]
    adapter, config = weighted_adapter(pairs, [2.0, -0.5], "cat", layouts=LAYOUTS)
    assert_peft_computes_the_same(base, tmp_path, adapter, config)
