import math

import jaxtyping
import pytest

from lora_jax import InputError, LoraConfig, QuantConfig
from lora_jax._errors import nearest


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
        ({"bias": "all"}, "use bias='none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"adapter_dtype": "int8"}, "use float32, bfloat16 or float16"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"use_dora": True}, "use_dora=True is not supported; leave it out"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA' is not supported"),
        ({"lora_alhpa": 8}, r"unknown field 'lora_alhpa' \(did you mean 'lora_alpha'\?\)"),
    ],
)
def test_a_wrong_field_gets_one_line(values, words):
    with pytest.raises(InputError, match=words) as caught:
        LoraConfig.from_dict(values, where="adapter_config.json")
    assert str(caught.value).startswith("adapter_config.json:")
    assert "\n" not in str(caught.value)


def test_fields_that_describe_and_fields_at_their_default_are_taken():
    values = {"peft_type": "LORA", "revision": "main", "use_dora": False, "rank_pattern": None}
    assert LoraConfig.from_dict({**values, "r": 3}) == LoraConfig(r=3)


@pytest.mark.parametrize("values", [{"format": "fp4"}, {"block_size": 32}])
def test_quantization_that_does_not_exist_is_refused(values, monkeypatch):
    # A user has no type checker running that would refuse the word first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="quant: "):
        QuantConfig(**values)


def test_nearest_word_or_nothing():
    assert nearest("targetmodules", ["target_modules", "r"]) == " (did you mean 'target_modules'?)"
    assert nearest("zzz", ["target_modules"]) == ""
