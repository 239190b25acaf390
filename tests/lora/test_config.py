"""LoraConfig takes PEFT's fields and refuses what it does not do."""

import dataclasses

import pytest

from lora_jax import InputError, LoraConfig


def test_the_usual_call_runs_to_the_letter():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    assert config.scaling("model/layers/0/self_attn/q_proj") == 2.0


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
        ("bias", "all"),
        ("use_rslora", "yes"),
        ("init_lora_weights", "pissa"),
        ("adapter_dtype", "float64"),
        ("target_modules", "("),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [True]),
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
