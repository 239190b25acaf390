"""Biases on B and of the base, to PEFT and from it: the same logits, gradients and keys."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

from lora_jax import (  # noqa: E402
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    partition,
    trainable_mask,
)
from lora_jax._tree import leaves_with_path, tree_from_paths  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402
from lora_jax.models import load_pretrained  # noqa: E402
from tests import compiled  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
IDS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
FIELDS = [
    {"lora_bias": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"bias": "all", "lora_bias": True, "use_rslora": True},
    {"lora_bias": True, "layers_to_transform": [1]},
    {"bias": "all", "layers_to_transform": [1]},
    {"bias": "all", "modules_to_save": ["up_proj"]},
    {"bias": "all", "lora_bias": True, "trainable_token_indices": [4, 30]},
]
NAMES = [" ".join(f"{k}={v}" for k, v in fields.items()) for fields in FIELDS]


@pytest.fixture(scope="module")
def base(biased_llama):
    return biased_llama(IDS)[:2]


def torch_model(directory):
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def logits(pretrained, params):
    return compiled.apply(lora_linen(pretrained.module), params, jnp.asarray(IDS))


def assert_near(got, expected):
    assert np.abs(np.asarray(got) - expected).max() <= 1e-5 * np.abs(expected).max()


def config_of(fields):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **fields}
    return {**options, "init_lora_weights": False}


def disturbed(adapter):
    """Whatever is trained away from where it starts; layers without an adapter keep their zeros."""
    key = jax.random.key(5)
    leaves = dict(leaves_with_path(adapter))
    for path in [path for path in leaves if path.endswith("bias")]:
        adapted = leaves.get(path.removesuffix("lora_B_bias") + "lora_scaling", jnp.ones(2)) != 0
        noise = jax.random.normal(key, leaves[path].shape)
        leaves[path] += 0.3 * noise * adapted[:, None]
    return tree_from_paths(leaves)


@pytest.mark.parametrize("fields", FIELDS, ids=NAMES)
def test_peft_computes_what_we_saved(base, tmp_path, fields):
    directory, pretrained = base
    config = LoraConfig(**config_of(fields))
    adapter = disturbed(init_adapter(jax.random.key(3), pretrained.params, config, layouts=LAYOUTS))
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(torch_model(directory), tmp_path / "a")
    assert not [str(w.message) for w in caught if "keys" in str(w.message)]
    expected = their_logits(model)
    plain = np.asarray(logits(pretrained, pretrained.params))
    assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()
    assert_near(logits(pretrained, combine(pretrained.params, adapter)), expected)
    merged = merge_adapter(pretrained.params, adapter, layouts=LAYOUTS)
    assert_near(compiled.apply(pretrained.module, merged, jnp.asarray(IDS)), expected)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a sharded factor
@pytest.mark.parametrize("fields", FIELDS, ids=NAMES)
def test_what_peft_saved_is_read_and_written_again(base, tmp_path, fields):
    directory, pretrained = base
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_model(directory), peft.LoraConfig(**config_of(fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    adapter, config = load_adapter(tmp_path / "theirs", pretrained.params, layouts=LAYOUTS)
    expected = their_logits(model)
    assert_near(logits(pretrained, combine(pretrained.params, adapter)), expected)
    merged = merge_adapter(pretrained.params, adapter, layouts=LAYOUTS)
    assert_near(their_logits(model.merge_and_unload()), expected)
    assert_near(compiled.apply(pretrained.module, merged, jnp.asarray(IDS)), expected)
    save_adapter(tmp_path / "ours", adapter, config, layouts=LAYOUTS)
    theirs, ours = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
    )
    # PEFT writes the biases of `modules_to_save` three times.
    twice = {k for k in theirs if "modules_to_save." in k or "original_module." in k}
    assert ours.keys() == theirs.keys() - twice
    assert bool(twice) == ("modules_to_save" in fields)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("fields", FIELDS, ids=NAMES)
def test_the_same_is_trained_by_the_same_gradient(base, tmp_path, fields):
    directory, pretrained = base
    config = LoraConfig(**config_of(fields))
    adapter = disturbed(init_adapter(jax.random.key(4), pretrained.params, config, layouts=LAYOUTS))
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    model = peft.PeftModel.from_pretrained(
        torch_model(directory), tmp_path / "a", is_trainable=True
    )
    model(torch.from_numpy(IDS).long()).logits.square().mean().backward()
    theirs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            theirs[key] = parameter.grad.numpy()
    trained, frozen = partition(adapter, trainable_mask(adapter, config))

    def loss(trained):
        params = combine(combine(pretrained.params, frozen), trained)
        return jnp.mean(logits(pretrained, params) ** 2)

    gradient = combine(frozen, jax.jit(jax.grad(loss))(trained))
    save_adapter(tmp_path / "g", gradient, config, layouts=LAYOUTS)
    ours = load_file(tmp_path / "g" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.abs(ours[key] - value).max() <= 2e-5 * np.abs(value).max(), key


def test_a_base_without_biases_reads_what_peft_wrote_for_none(tmp_path):
    """PEFT trains no bias then and says nothing; its file is like any other."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    options = config_of({"bias": "lora_only"})
    model = peft.get_peft_model(torch_model(tmp_path / "model"), peft.LoraConfig(**options))
    model.save_pretrained(tmp_path / "a")
    pretrained = load_pretrained(tmp_path / "model")
    adapter, config = load_adapter(tmp_path / "a", pretrained.params, layouts=LAYOUTS)
    assert config.bias == "none"
    assert_near(logits(pretrained, combine(pretrained.params, adapter)), their_logits(model))


def test_a_bias_on_b_where_the_base_has_none(tmp_path):
    """Both compute with it, and neither can merge it."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    pretrained, config = (
        load_pretrained(tmp_path / "model"),
        LoraConfig(**config_of({"lora_bias": True})),
    )
    adapter = init_adapter(jax.random.key(0), pretrained.params, config, layouts=LAYOUTS)
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model = peft.PeftModel.from_pretrained(torch_model(tmp_path / "model"), tmp_path / "a")
    assert_near(logits(pretrained, combine(pretrained.params, adapter)), their_logits(model))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="this base has none"):
        merge_adapter(pretrained.params, adapter, layouts=LAYOUTS)
