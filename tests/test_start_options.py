"""Options of starts that look at data, as PEFT has them."""

import dataclasses
import json

import pytest

from lora_jax import InputError, LoraConfig


def test_options_are_filled_in_with_the_start_and_absent_without():
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 3})
    assert config.eva_config == {
        "rho": 3,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    }
    assert config.corda_config is None and config.lora_ga_config is None
    assert config.starts_from_data and not config.moves_base
    again = LoraConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
    for init in ("corda", "lora_ga"):
        moving = LoraConfig(init_lora_weights=init)
        assert moving.starts_from_data and moving.moves_base
    plain = LoraConfig()
    assert not plain.starts_from_data and plain.eva_config is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eva_config": {}}, "eva_config goes with init_lora_weights='eva', not True"),
        ({"init_lora_weights": "eva", "corda_config": {}}, "corda_config goes with .*, not 'eva'"),
        ({"init_lora_weights": "eva", "eva_config": {"roh": 2}}, r"'roh' \(did you mean 'rho'\?\)"),
        ({"init_lora_weights": "eva", "eva_config": {"x": 2}}, "option 'x'; known: rho, tau"),
        ({"init_lora_weights": "eva", "eva_config": {7: 2}}, "unknown option 7"),
        ({"init_lora_weights": "eva", "eva_config": 2}, "must be a section of options, got 2"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho=0.5: use a number of at"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": float("inf")}}, "rho=inf"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 1.5}}, "tau=1.5: use a number from 0"),
        ({"init_lora_weights": "eva", "eva_config": {"whiten": 1}}, "whiten=1: use true or false"),
        ({"init_lora_weights": "eva", "eva_config": {"label_mask_value": 0.5}}, "an integer"),
        (
            {"init_lora_weights": "corda", "corda_config": {"corda_method": "imp"}},
            "corda_method='imp': use 'ipm', 'kpm'",
        ),
        (
            {"init_lora_weights": "corda", "corda_config": {"cache_file": "c.pt"}},
            "cache_file='c.pt': use None, nothing else is supported",
        ),
        (
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArB3r"}},
            "direction='ArB3r': use 'ArB2r', 'A2rBr', 'ArBr', 'random'",
        ),
        (
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}},
            "stable_gamma=0: use a positive integer",
        ),
        ({"init_lora_weights": "evaa"}, r"'evaa' is not supported \(did you mean 'eva'\?\)"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(InputError, match=message) as raised:
        LoraConfig(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.oracle
def test_options_and_defaults_are_those_of_peft():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from peft.tuners.lora import config as theirs

    classes = {
        "eva": theirs.EvaConfig,
        "corda": theirs.CordaConfig,
        "lora_ga": theirs.LoraGAConfig,
    }
    for name, cls in classes.items():
        ours = getattr(LoraConfig(init_lora_weights=name), f"{name}_config")
        assert ours == vars(cls())
