"""What vLLM and TGI take of adapters that are written here, by their readers' rules.

Neither runs here.  The rules are those of vLLM's `vllm/lora/peft_helper.py`, `lora_model.py` and
`utils.py`, and of TGI's `server/text_generation_server/adapters/lora.py` and `utils/adapter.py`, as
they stood in 2026.
"""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoraConfig
from lora_jax._merging import merge_directories
from lora_jax.adapters import save_adapter
from lora_jax.lora import init_with_base
from lora_jax.models import load_pretrained

LAYERS = 2
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MODULES = [
    *(f"self_attn.{name}" for name in ATTENTION),
    *(f"mlp.{name}" for name in MLP),
]


@pytest.fixture(scope="module")
def pretrained(base_dir):
    return load_pretrained(base_dir)


@pytest.fixture
def saved(pretrained, tmp_path):
    def save(**fields):
        config = LoraConfig(r=8, lora_alpha=16, **{"target_modules": "all-linear", **fields})
        _, adapter = init_with_base(
            jax.random.key(0), pretrained.params, config, layouts=pretrained.layouts
        )
        save_adapter(tmp_path / "adapter", adapter, config, layouts=pretrained.layouts)
        return tmp_path / "adapter"

    return save


def vllm_objections(directory):
    """Why vLLM refuses an adapter of a Llama, or would make another one of it."""
    config, tensors = _files(directory)
    found = {field for field in ("use_dora", "modules_to_save") if config[field]}
    found |= {"bias"} if config["bias"] != "none" else set()
    assert type(config["r"]) is int and 0 < config["r"] <= 512  # --max-lora-rank
    assert config["trainable_token_indices"] is None
    for name, tensor in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        factor = parts[-2:] in (["lora_A", "weight"], ["lora_B", "weight"])
        if not (factor and parts[-3] in (*ATTENTION, *MLP)):
            found.add(f"tensor {'.'.join(parts[-2:])}")
        elif parts[-2] == "lora_A":
            assert tensor.shape[0] <= config["r"]
    return found | _strengths(config, tensors)


def tgi_objections(directory):
    """What TGI leaves out of an adapter of a Llama, or would make another one of."""
    config, tensors = _files(directory)
    assert config["peft_type"] == "LORA"  # PEFT reads it there
    pairs = {
        module: [
            f"base_model.model.model.layers.{layer}.{module}.{factor}.weight"
            for layer in range(LAYERS)
            for factor in ("lora_A", "lora_B")
        ]
        for module in MODULES
    }
    # A module that some layer lacks is left out of all.
    taken = {name for names in pairs.values() if set(names) <= set(tensors) for name in names}
    left = {f"left out {'.'.join(name.split('.')[-2:])}" for name in set(tensors) - taken}
    return left | _strengths(config, tensors)


def _files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def _strengths(config, tensors):
    """What makes a module's strength another than alpha over r, or the base another one."""
    assert config["use_rslora"] in (True, False) and math.isfinite(config["lora_alpha"])
    assert not config["fan_in_fan_out"]
    found = {field for field in ("rank_pattern", "alpha_pattern") if config[field]}
    if config["init_lora_weights"] in ("pissa", "olora"):
        found.add("init_lora_weights")
    return found


FITS = [
    {},
    {"use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(gate|up)_proj"},
    {"init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("fields", FITS, ids=str)
def test_both_take_a_plain_adapter_as_it_is(saved, fields):
    directory = saved(**fields)
    assert vllm_objections(directory) == tgi_objections(directory) == set()
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for name, tensor in _files(directory)[1].items():
        assert tensor.dtype == np.float32 and tensor.ndim == 2
        assert tensor.shape[0 if "lora_A" in name else 1] == 8


OTHERWISE = [
    (
        {"use_dora": True},
        {"use_dora", "tensor q_proj.lora_magnitude_vector"},
        {"left out q_proj.lora_magnitude_vector"},
    ),
    (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save", "tensor lm_head.weight"},
        {"left out lm_head.weight"},
    ),
    ({"lora_bias": True}, {"tensor lora_B.bias"}, {"left out lora_B.bias"}),
    ({"alpha_pattern": {"q_proj": 4}}, {"alpha_pattern"}, {"alpha_pattern"}),
    ({"rank_pattern": {"q_proj": 4}}, {"rank_pattern"}, {"rank_pattern"}),
    ({"init_lora_weights": "pissa"}, {"init_lora_weights"}, {"init_lora_weights"}),
    (
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        set(),
        {"left out lora_A.weight", "left out lora_B.weight"},
    ),
]


@pytest.mark.parametrize(
    ("fields", "vllm", "tgi"), OTHERWISE, ids=lambda x: str(x)[:40] if isinstance(x, dict) else ""
)
def test_what_they_refuse_or_read_otherwise_has_to_be_merged(saved, fields, vllm, tgi):
    directory = saved(**{"target_modules": ["q_proj"], **fields})
    assert vllm_objections(directory) == vllm
    assert tgi_objections(directory) == tgi


def test_a_merged_model_is_a_checkpoint_like_any_other(saved, base_dir, tmp_path):
    """Both read the class of the model from its config, and the tensors by the base's own names."""
    merged = tmp_path / "merged"
    merge_directories(str(base_dir), str(saved(use_dora=True)), str(merged), "bfloat16", None)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama" and config["torch_dtype"] == "bfloat16"
    names = load_file(base_dir / "model.safetensors").keys()
    tensors = load_file(merged / "model.safetensors")
    assert tensors.keys() == names
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in merged.iterdir()}
