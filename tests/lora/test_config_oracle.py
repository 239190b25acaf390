"""Every field of the installed PEFT is known: taken, or accepted at its default only."""

import dataclasses
import json

import pytest

peft = pytest.importorskip("peft")

from lora_jax import InputError, LoraConfig  # noqa: E402

pytestmark = pytest.mark.oracle

OURS = {field.name for field in dataclasses.fields(LoraConfig)} - {"adapter_dtype"}
FACTS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
}


def defaults():
    raw = peft.LoraConfig().to_dict()
    return json.loads(json.dumps(raw, default=lambda x: sorted(x) if isinstance(x, set) else x))


def test_peft_defaults_are_our_defaults():
    config = LoraConfig.from_dict(defaults())
    assert dataclasses.asdict(config) == dataclasses.asdict(LoraConfig())
    rest = {k: v for k, v in defaults().items() if k not in FACTS}
    assert LoraConfig(**rest) == LoraConfig()


def test_our_fields_are_all_peft_fields():
    assert set(defaults()) >= OURS


@pytest.mark.parametrize("field", sorted(set(defaults()) - OURS - FACTS))
def test_what_is_not_implemented_is_refused_by_name(field):
    with pytest.raises(InputError, match=f"{field}='surely not this'"):
        LoraConfig.from_dict({field: "surely not this"})
    with pytest.raises(InputError, match=field):
        LoraConfig(**{field: "surely not this"})


def test_a_config_written_by_peft_is_read(tmp_path):
    theirs = peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert LoraConfig.from_dict(raw) == LoraConfig(
        r=4, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
