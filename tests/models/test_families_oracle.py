"""Every family against transformers and PEFT: logits, gradients, text, adapters and files."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import combine, lora_linen, merge_adapter
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.models import generate, load_pretrained, save_pretrained
from lora_jax.models._checkpoint import read_config
from lora_jax.models._families import FAMILIES
from tests.models import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.oracle

relative, some_ids = families.relative, families.some_ids

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20], [30, 31, 32]]
TOKENS = 64


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("name", families.MODELS)
def test_logits_and_the_way_back(tmp_path, name):
    """Theirs read here give their logits; ours written are read by them and give the same."""
    ids, pretrained = some_ids(), families.ours(name)
    expected = their_logits(families.theirs(name), ids)
    assert relative(families.forward(name)(pretrained.params, ids), expected) < 1e-5
    save_pretrained(tmp_path / "m", pretrained.params, pretrained.config, dtype="float32")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(families.theirs(name))
    assert relative(their_logits(again, ids), expected) < 1e-6


@pytest.mark.parametrize("name", families.MODELS)
def test_greedy_text_of_a_padded_batch(name):
    """64 tokens a row, token for token up to where their two best logits nearly tie."""
    # A copy: their dynamic positions stay stretched once a text was long.
    model, pretrained = copy.deepcopy(families.theirs(name)), families.ours(name)
    # And they stretch all rows by the longest one's length, ours each by its own.
    prompts = PROMPTS[:1] if "dynamic" in name else PROMPTS
    got = generate(pretrained.module, pretrained.params, prompts, max_new_tokens=TOKENS)
    compared = families.same_as_their_greedy(model, prompts, got)
    assert compared > 0.6 * TOKENS * len(prompts)


@pytest.mark.parametrize("name", families.MODELS)
def test_adapters_of_peft_and_ours(tmp_path, name):
    """PEFT's adapter of all linear layers: logits, gradients, merge, and back in our file."""
    ids, pretrained = some_ids(), families.ours(name)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    model = peft.get_peft_model(families.theirs(name), config)
    try:
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for factor in factors.values():
            torch.nn.init.normal_(factor.data, 0.0, 0.1)
        model.save_pretrained(tmp_path / "theirs")
        logits = model(torch.from_numpy(ids)).logits
        cotangent = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
        gradients = torch.autograd.grad(
            (logits * torch.from_numpy(cotangent)).sum(), list(factors.values())
        )
    finally:
        model.unload()
    expected = logits.detach().numpy()

    layouts, base = pretrained.layouts, pretrained.params
    adapter, own = load_adapter(tmp_path / "theirs", base, layouts=layouts)
    adapted = lora_linen(pretrained.module)

    @jax.jit
    def pull(adapter):
        def apply(adapter):
            return adapted.apply({"params": combine(base, adapter)}, jnp.asarray(ids))

        logits, backward = jax.vjp(apply, adapter)
        return logits, backward(jnp.asarray(cotangent))[0]

    found, by_adapter = pull(adapter)
    assert relative(found, expected) < 1e-5
    merged = merge_adapter(base, adapter, layouts=layouts)
    assert relative(families.forward(name)(merged, ids), expected) < 1e-5

    # The gradients in a file of PEFT's, whose names and transposes are then the same.
    scalings = {path: x for path, x in _flat(adapter) if path.endswith("lora_scaling")}
    as_adapter = jax.tree_util.tree_map_with_path(
        lambda path, x: scalings.get(jax.tree_util.keystr(path, simple=True, separator="/"), x),
        by_adapter,
    )
    save_adapter(tmp_path / "gradients", as_adapter, own, layouts=layouts)
    ours = _tensors(tmp_path / "gradients")
    assert len(ours) == len(gradients)
    for key, theirs in zip(factors, gradients, strict=True):
        assert relative(ours[key.replace(".default", "")], theirs.numpy()) < 1e-4, key

    save_adapter(tmp_path / "ours", adapter, own, layouts=layouts)
    again = peft.PeftModel.from_pretrained(families.theirs(name), tmp_path / "ours")
    try:
        assert relative(their_logits(again, ids), expected) < 1e-6
    finally:
        again.unload()


def _flat(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), x


def _tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_a_config_of_transformers_4_with_windows(tmp_path):
    """Version 4 writes rope_theta, rope_local_base_freq and sliding_window_pattern."""
    raw = json.loads((families.saved("gemma3") / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    del raw["layer_types"]
    raw |= {
        "rope_theta": rope["full_attention"].pop("rope_theta"),
        "rope_scaling": rope["full_attention"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == families.ours("gemma3").config


def test_the_original_names_of_gpt2(tmp_path):
    """The published file has no `transformer.` and keeps its causal masks as tensors."""
    directory = families.saved("gpt2")
    tensors = load_file(directory / "model.safetensors")
    bare = {
        key.removeprefix("transformer."): x for key, x in tensors.items() if "lm_head" not in key
    }
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copyfile(directory / "config.json", tmp_path / "config.json")
    read = load_pretrained(tmp_path)
    expected = families.ours("gpt2").params
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, expected))


def test_default_targets_are_those_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    known = {name: FAMILIES[name].default_targets for name in FAMILIES.keys() & THEIRS.keys()}
    assert len(known) >= 9
    assert known == {name: THEIRS[name] for name in known}
