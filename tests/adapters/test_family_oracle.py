"""Every variant under every start that PEFT has: made there, read and merged here, and back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import combine, merge_adapter  # noqa: E402
from lora_jax._tree import leaves_with_path  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
IDS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "bias on B": {"lora_bias": True},
}
# The randomized pissa_niter_N moves the base by what no file can say.
STARTS = [True, False, "gaussian", "orthogonal", "pissa", "olora"]
CELLS = [
    pytest.param(fields, start, id=f"{name}, {start}")
    for name, fields in VARIANTS.items()
    for start in STARTS
    if isinstance(start, bool) or "lora_bias" not in fields  # PEFT refuses the others too
]


@pytest.fixture(scope="module")
def base(biased_llama):
    return biased_llama(IDS)


def torch_base(directory):
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def assert_near(got, expected):
    assert np.abs(np.asarray(got) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a sharded factor
@pytest.mark.parametrize(("fields", "start"), CELLS)
def test_a_cell(base, tmp_path, fields, start):
    directory, pretrained, logits = base
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start, **fields
    )
    model = peft.get_peft_model(torch_base(directory), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn_like(parameter) * (0.1 + parameter.abs().mean())
    model.save_pretrained(tmp_path / "theirs")
    expected, plain = their_logits(model), their_logits(torch_base(directory))
    assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()

    adapter, read = load_adapter(tmp_path / "theirs", pretrained.params, layouts=LAYOUTS)
    assert_near(logits(combine(pretrained.params, adapter)), expected)
    merged = merge_adapter(pretrained.params, adapter, layouts=LAYOUTS)
    assert_near(logits(merged), expected)

    save_adapter(tmp_path / "ours", adapter, read, layouts=LAYOUTS)
    again = peft.PeftModel.from_pretrained(torch_base(directory), tmp_path / "ours")
    assert_near(their_logits(again), expected)
    assert any(np.any(x) for path, x in leaves_with_path(adapter) if path.endswith("lora_B"))
