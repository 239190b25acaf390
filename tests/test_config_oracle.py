"""`LoraConfig` against PEFT's: the same fields, defaults, ranks, alphas and scalings."""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import InputError, LoraConfig  # noqa: E402
from lora_jax._peft_fields import PEFT_DEFAULTS, WITHOUT_EFFECT  # noqa: E402

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


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q", "layers_to_transform": [0]},
        {"target_modules": "q", "layers_pattern": "layers"},
        {"target_modules": ["q"], "layers_pattern": "layers"},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"lora_bias": True, "init_lora_weights": "pissa"},
        {"lora_bias": True, "use_dora": True},
    ],
)
def test_what_peft_refuses_is_refused(fields):
    with pytest.raises(ValueError):
        peft.LoraConfig(**fields)
    with pytest.raises(InputError, match="lora: "):
        LoraConfig(**fields)


@pytest.mark.parametrize("field", sorted(set(defaults()) - OURS - FACTS - set(WITHOUT_EFFECT)))
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


def plain(value):
    """Enumerations as what a file holds; what PEFT keeps as an empty mapping or None is empty."""
    return getattr(value, "value", value) or None


def test_defaults_are_those_of_peft():
    theirs = vars(peft.LoraConfig())
    ours = dataclasses.asdict(LoraConfig()) | PEFT_DEFAULTS
    both = theirs.keys() & ours.keys()
    assert len(both) >= 20
    assert {k: plain(ours[k]) for k in both} == {k: plain(theirs[k]) for k in both}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)
        self.up_proj = torch.nn.Linear(4, 4)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block() for _ in range(12)])


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.up_proj": 4}},
        {"rank_pattern": {r"layers\.(0|1)\..*": 3}, "alpha_pattern": {"up_proj": 64}},
        {"alpha_pattern": {"1.q_proj": 5, "up_proj": 7}, "use_rslora": True},
        {"rank_pattern": {r"^layers\.1\.q_proj": 5}},
    ],
)
def test_rank_and_scaling_at_every_path(extra):
    fields = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj", "up_proj"], **extra}
    model = peft.get_peft_model(Model(), peft.LoraConfig(**fields))
    ours = LoraConfig(**fields)
    seen = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "scaling"):
            seen += 1
            assert ours.rank(name.replace(".", "/")) == module.r["default"], name
            assert ours.scaling(name.replace(".", "/")) == module.scaling["default"], name
    assert seen == 24
