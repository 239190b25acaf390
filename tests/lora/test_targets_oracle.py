"""The same modules, ranks and scalings as PEFT on a torch model with the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import LoraConfig  # noqa: E402
from lora_jax.lora import KernelLayout, find_targets, matched_targets  # noqa: E402

pytestmark = pytest.mark.oracle
LAYERS = 3


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()

        def layer():
            attn = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q_proj", "v_proj")})
            return torch.nn.ModuleDict({"self_attn": attn, "mlp": MLP()})

        layers = torch.nn.ModuleList([layer() for _ in range(LAYERS)])
        self.model = torch.nn.ModuleDict({"layers": layers})
        self.lm_head = torch.nn.Linear(4, 5)


def ours():
    kernel = {"kernel": jax.ShapeDtypeStruct((LAYERS, 4, 4), jnp.float32)}
    return {
        "model": {
            "layers": {
                "self_attn": {"q_proj": kernel, "v_proj": kernel},
                "mlp": {"up_proj": kernel, "proj": kernel},
            }
        },
        "lm_head": {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.float32)},
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": r".*proj", "exclude_modules": ["q_proj"]},
        {"target_modules": r".*proj", "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "proj"], "layers_to_transform": 1},
        {"target_modules": ["model.layers.0.mlp.proj", "q_proj"], "layers_to_transform": [2]},
        {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [2]},
        {"target_modules": ["lm_head", "mlp.proj"], "layers_to_transform": []},
        {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": ["lay.*"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 1], "layers_pattern": []},
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ""},
        {"target_modules": r".*proj", "modules_to_save": ["mlp"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {
            "target_modules": r".*proj",
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\..*": 3, "layers.1.mlp.proj": 5},
            "alpha_pattern": {r"layers\.2\.self_attn\.v_proj": 32, r".*\.0\..*": 7},
        },
        {"target_modules": r".*proj", "rank_pattern": {"proj": 2}, "use_rslora": True},
    ],
)
def test_targets_ranks_and_scalings(fields):
    theirs = peft.get_peft_model(Torch(), peft.LoraConfig(r=4, lora_alpha=8, **fields))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    stack = {"model/layers": KernelLayout(stack="model/layers")}
    config = LoraConfig(r=4, lora_alpha=8, **fields)
    found = {
        name.replace("/", "."): (rank, scaling)
        for target in find_targets(ours(), config, layouts=stack)
        for name, rank, scaling in zip(target.names, target.ranks, target.scalings, strict=True)
        if rank
    }
    assert found == expected


def nested():
    """A list at the root, of modules that hold a list."""

    def block():
        experts = [torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)}) for _ in range(2)]
        return torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)})

    blocks = [block() for _ in range(2)]
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(blocks)})


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
        {"layers_to_transform": [1], "layers_pattern": "experts"},
        {"layers_to_transform": 0, "layers_pattern": ["h", "(blocks|experts)"]},
    ],
)
def test_which_list_the_numbers_count(fields):
    """By default the first that lies below another module: here that of the experts."""
    theirs = peft.get_peft_model(nested(), peft.LoraConfig(target_modules=["up"], **fields))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    kernel = {"up": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    params = {"blocks": {str(i): {"experts": {"0": kernel, "1": kernel}} for i in range(2)}}
    targets = matched_targets(params, LoraConfig(target_modules=["up"], **fields))
    assert {n.replace("/", ".") for t in targets for n in t.names} == expected
    assert len(expected) == 2


def test_all_linear_leaves_out_the_output_layer():
    transformers = pytest.importorskip("transformers")
    from lora_jax.models import ModelConfig
    from lora_jax.models._formats import abstract_params

    shape = dict(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    stack = {"model/layers": KernelLayout(stack="model/layers")}
    params = abstract_params(ModelConfig(**shape))
    config = LoraConfig(target_modules="all-linear")
    targets = find_targets(params, config, layouts=stack)
    assert {n.replace("/", ".") for t in targets for n in t.names} == expected


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_spread_is_peft_s(init):
    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(400, 300)})
    torch.manual_seed(0)
    model = peft.get_peft_model(
        layer, peft.LoraConfig(r=16, target_modules=["q"], init_lora_weights=init)
    )
    from lora_jax import init_adapter

    params = {"q": {"kernel": jax.ShapeDtypeStruct((400, 300), jnp.float32)}}
    config = LoraConfig(r=16, target_modules=["q"], init_lora_weights=init)
    ours = init_adapter(jax.random.key(0), params, config)["q"]
    q = model.base_model.model["q"]
    for name, theirs in (("lora_A", q.lora_A), ("lora_B", q.lora_B)):
        expected = theirs["default"].weight.detach().numpy()
        np.testing.assert_allclose(np.std(ours[name]), expected.std(), rtol=0.05)
        if init != "gaussian":
            np.testing.assert_allclose(np.abs(ours[name]).max(), np.abs(expected).max(), rtol=0.01)
