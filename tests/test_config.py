"""LoraConfig takes PEFT's fields and refuses what it does not do; QuantConfig likewise."""

import dataclasses
import json
import math

import jaxtyping
import numpy as np
import pytest

from lora_jax import InputError, LoraConfig, QuantConfig
from lora_jax._errors import nearest
from lora_jax._peft_fields import UNSUPPORTED


def test_the_readme_call_is_taken_to_the_letter():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    assert config.scaling("model/layers/0/self_attn/q_proj") == 2.0


def test_scaling_is_alpha_over_rank_or_its_root():
    assert LoraConfig(r=16, lora_alpha=8).scaling("x") == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling("x") == 8 / math.sqrt(16)


def test_patterns_change_rank_and_alpha_where_they_match():
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 32}
    )
    path = "model/layers/1/self_attn/q_proj"
    assert (config.rank(path), config.alpha(path), config.scaling(path)) == (2, 32, 16.0)
    assert config.scaling("model/layers/0/self_attn/v_proj") == 2.0
    assert config.scaling("model/layers/0/self_attn/q_proj") == 4.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "rank r must be a positive integer, got 0"),
        ({"r": True}, "rank r must be"),
        ({"rank_pattern": {"q": 0}}, "rank q must be"),
        ({"lora_alpha": 0}, "alpha lora_alpha must be positive"),
        ({"alpha_pattern": {"q": math.inf}}, "alpha q must be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"bias": "lora"}, "bias must be one of none, all, lora_only; got 'lora'"),
        ({"init_lora_weights": "nothing"}, "init_lora_weights='nothing' is not supported"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not supported: MiCA, which"),
        ({"adapter_dtype": "int8"}, "use float32, bfloat16 or float16"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"lora_bias": "yes"}, "lora_bias must be true or false, got 'yes'"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias does not go with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "true or false, not 'gaussian'"),
        ({"layers_pattern": "h"}, "layers_pattern='h' says what layers_to_transform counts"),
        ({"layers_pattern": ["("], "layers_to_transform": 0}, "not a regular expression"),
        ({"target_modules": "q", "layers_to_transform": 0}, "goes with a list of target_modules"),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern goes with a list"),
        ({"layer_replication": [[0, 4]]}, "layer_replication=.* a base with layers repeated; save"),
        ({"use_qalora": True}, "use_qalora=True is not supported: QA-LoRA, .*; use QLoRA"),
        ({"enable_lora": [True, False]}, "convert it with the PEFT that wrote it"),
        ({"use_bdlra": True}, r"unknown field 'use_bdlra' \(did you mean 'use_bdlora'\?\)"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA' is not supported"),
        ({"lora_alhpa": 8}, r"unknown field 'lora_alhpa' \(did you mean 'lora_alpha'\?\)"),
    ],
)
def test_a_wrong_field_gets_one_line(values, words):
    with pytest.raises(InputError, match=words) as caught:
        LoraConfig.from_dict(values, where="adapter_config.json")
    assert str(caught.value).startswith("adapter_config.json:")
    assert "\n" not in str(caught.value)


OLD = {
    "0.2": {
        "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": True, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "target_modules": ["q"], "task_type": "CAUSAL_LM",
    },
    "0.3": {
        "base_model_name_or_path": "gpt2", "bias": "lora_only", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "modules_to_save": None, "peft_type": "LORA", "r": 8, "target_modules": ["q"],
        "task_type": "CAUSAL_LM",
    },
    "0.4": {
        "auto_mapping": None, "base_model_name_or_path": "x", "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": "", "layers_to_transform": None, "lora_alpha": 16, "lora_dropout": 0.1,
        "modules_to_save": None, "peft_type": "LORA", "r": 8, "revision": None,
        "target_modules": "q", "task_type": None,
    },
    "0.8": {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "x", "bias": "all",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": "gaussian",
        "layers_pattern": "layers", "layers_to_transform": [0, 1], "loftq_config": {},
        "lora_alpha": 16, "lora_dropout": 0.1, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "rank_pattern": {}, "revision": None, "target_modules": ["q"], "task_type": None,
        "use_rslora": False,
    },
}  # fmt: skip
"""What `adapter_config.json` held in older versions of PEFT."""


@pytest.mark.parametrize("version", OLD)
def test_configs_of_older_versions_are_read(version):
    raw = OLD[version]
    config = LoraConfig.from_dict(raw)
    ours = dataclasses.asdict(config)
    assert {k: raw[k] or None for k in raw.keys() & ours} == {
        k: ours[k] or None for k in raw.keys() & ours
    }
    assert config.r == 8 and config.alpha("q") == 16


def test_every_refused_field_has_a_reason_of_its_own():
    reasons = [why for _, why in UNSUPPORTED.values()]
    assert len(set(reasons)) == len(reasons) and all(";" in why for why in reasons)
    for name, (accepted, _) in UNSUPPORTED.items():
        for value in accepted:
            assert LoraConfig(**{name: value}) == LoraConfig()


def test_fields_that_describe_and_fields_at_their_default_are_taken():
    values = {"peft_type": "LORA", "revision": "main", "lora_bias": False, "rank_pattern": None}
    assert LoraConfig.from_dict({**values, "r": 3}) == LoraConfig(r=3)


def test_scaling_follows_patterns_and_rslora():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 16, r"layers\.[01]\.v_proj": 9},
        alpha_pattern={"q_proj": 2},
    )
    assert config.scaling("layers/0/q_proj") == 2 / 4
    assert config.scaling("layers/1/v_proj") == 8 / 3
    assert config.scaling("layers/2/v_proj") == 8 / 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.0),
        ("r", None),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": 0}),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "8"),
        ("lora_dropout", 1.0),
        ("lora_dropout", None),
        ("lora_dropout", "0.1"),
        ("bias", "every"),
        ("use_rslora", "yes"),
        ("init_lora_weights", "nothing"),
        ("adapter_dtype", "float64"),
        ("target_modules", "("),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [True]),
        ("layers_to_transform", {0, "1"}),
        ("layers_to_transform", -1),
        ("lora_alpha", True),
        ("rank_pattern", {3: 2}),
        ("task_type", 3),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(InputError) as error:
        LoraConfig.from_dict({field: value}, where="adapter_config.json")
    message = str(error.value)
    word = "(" if "(" in (value if isinstance(value, str | dict) else "") else field
    assert word.removeprefix("lora_").split("_")[0] in message
    assert message.startswith("adapter_config.json: ") and "\n" not in message


def test_a_misspelt_field_suggests_the_nearest():
    for make in (lambda **raw: LoraConfig(**raw), lambda **raw: LoraConfig.from_dict(raw)):
        with pytest.raises(InputError, match="'lora_alhpa' .did you mean 'lora_alpha'"):
            make(lora_alhpa=16)


def test_other_kinds_of_adapter_are_refused():
    with pytest.raises(InputError, match="PROMPT_TUNING"):
        LoraConfig.from_dict({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8})


def test_tuples_and_sets_become_lists():
    config = LoraConfig(target_modules={"v", "q"}, modules_to_save=("head",))  # type: ignore
    assert config.target_modules == ["q", "v"] and config.modules_to_save == ["head"]
    assert dataclasses.replace(config, r=2).target_modules == ["q", "v"]
    for layers in ((2, 0), range(3), {2, 0}, np.arange(2)):
        numbers = LoraConfig(layers_to_transform=layers).layers_to_transform
        assert numbers == sorted(layers) or numbers == list(layers)
        assert all(type(number) is int for number in numbers)


def test_numbers_of_numpy_are_taken_as_python_s():
    config = LoraConfig(
        r=np.int64(4),
        lora_alpha=np.float32(8),
        lora_dropout=np.float64(0.5),
        rank_pattern={"q": np.int32(2)},
        layers_to_transform=np.array(1),
        init_lora_weights=np.True_,
        use_rslora=np.False_,
    )
    assert config == LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, rank_pattern={"q": 2}, layers_to_transform=1
    )
    json.dumps(dataclasses.asdict(config))


def test_equal_configs_are_one_key():
    def config(**patterns):
        return LoraConfig(r=4, target_modules=["q"], layers_to_transform=[0], rank_pattern=patterns)

    assert {config(a=1, b=2): 1}[config(a=1, b=2)] == 1
    # The first pattern that matches wins, so their order is part of the config.
    assert config(a=1, b=2) != config(b=2, a=1)
    assert config(b=2, a=1) not in {config(a=1, b=2)}


@pytest.mark.parametrize(
    "values",
    [
        {"format": "nf3"},
        {"format": None},
        {"head": "fp8"},
        {"block_size": 16},
        {"block_size": 33},
        {"block_size": 8192},
        {"block_size": 64.0},
        {"double_quant": "yes"},
        {"absmax_dtype": "float16", "double_quant": False},
        {"absmax_dtype": "bfloat16"},
        {"zero_point": True},
    ],
    ids=str,
)
def test_quantization_that_does_not_exist_is_refused(values, monkeypatch):
    # A user has no type checker running that would refuse the word first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="quant: "):
        QuantConfig(**values)


def test_nearest_word_or_nothing():
    assert nearest("targetmodules", ["target_modules", "r"]) == " (did you mean 'target_modules'?)"
    assert nearest("zzz", ["target_modules"]) == ""
