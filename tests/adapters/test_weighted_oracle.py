"""Every combination type beside PEFT's `add_weighted_adapter`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.utils import merge_utils  # noqa: E402

from lora_jax import LoraConfig  # noqa: E402
from lora_jax.adapters import _rule, load_adapter, save_adapter, weighted_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"layers": KernelLayout(stack="layers")}
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
TYPES = ["svd", "linear", "cat", *PRUNING, *(f"{name}_svd" for name in PRUNING)]
BASE = {"layers": {"q": {"kernel": jnp.zeros((2, 12, 9))}, "v": {"kernel": jnp.zeros((2, 12, 5))}}}
FIELDS = [
    {"lora_alpha": 3, "target_modules": ["q"]},
    {"lora_alpha": 10, "target_modules": ["q", "v"], "use_rslora": True},
    {"lora_alpha": 7, "target_modules": ["q", "v"]},
]
WEIGHTS = [0.7, -0.4, 1.3]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = torch.nn.Linear(12, 9), torch.nn.Linear(12, 5)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        return x


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e = torch.nn.Embedding(11, 6)

    def forward(self, ids):
        return self.e(ids)


def build(tmp_path, ranks=(4, 4, 4), fields=FIELDS):
    """PEFT's model with three adapters, and the same as pairs."""
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=r, init_lora_weights=False, **own)
        for r, own in zip(ranks, fields, strict=True)
    ]
    model = peft.get_peft_model(Model(), configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config)
    model.save_pretrained(tmp_path)
    names = [f"a{i}" for i in range(len(configs))]
    return model, [load_adapter(tmp_path / name, BASE, layouts=LAYOUTS) for name in names]


def theirs(model, name, kind="lora_A"):
    """scaling·A·B, or a factor, of every module that has the adapter."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            if kind == "delta":
                value = module.get_delta_weight(name)
            else:
                value = getattr(module, kind)[name].weight
            found[path] = value.detach().numpy().T
    return found


def ours(adapter, kind="lora_A"):
    found = {}
    for module, leaf in adapter["layers"].items():
        for i in range(2):
            a, b, scaling = (np.asarray(leaf[f"lora_{part}"][i]) for part in ("A", "B", "scaling"))
            found[f"layers.{i}.{module}"] = scaling * (a @ b) if kind == "delta" else leaf[kind][i]
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        largest = np.abs(value).max()
        assert largest > 0
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5 * largest)


@pytest.fixture
def same_masks(monkeypatch):
    """Let PEFT drop what we dropped: it meets our tensors again, transposed."""
    seen = []
    drop = _rule.drop

    def recorded(x, key, rate):
        kept = drop(x, key, rate)
        seen.append((np.asarray(x), np.asarray(kept) != 0))
        return kept

    def replayed(tensor, density, rescale):
        x = tensor.detach().numpy().T
        alike = [k for y, k in seen if y.shape == x.shape and np.allclose(y, x, atol=1e-6)]
        assert len(alike) == 1 and rescale
        return tensor * torch.from_numpy(alike[0].T.copy()) / density

    monkeypatch.setattr(_rule, "drop", recorded)
    monkeypatch.setattr(merge_utils, "random_pruning", replayed)


def combine_both(model, pairs, kind, **options):
    adapter, config = weighted_adapter(
        pairs, WEIGHTS, kind, key=jax.random.key(5), layouts=LAYOUTS, **options
    )
    model.add_weighted_adapter([f"a{i}" for i in range(3)], WEIGHTS, "new", kind, **options)
    return adapter, config


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_equals_peft(tmp_path, same_masks, kind):
    model, pairs = build(tmp_path)
    options = {"density": 0.6} if kind.removesuffix("_svd") in PRUNING else {}
    adapter, config = combine_both(model, pairs, kind, **options)
    assert_equal(ours(adapter, "delta"), theirs(model, "new", "delta"))
    if not kind.endswith("svd"):
        for factor in ("lora_A", "lora_B"):
            assert_equal(ours(adapter, factor), theirs(model, "new", factor))
    new = model.peft_config["new"]
    assert (config.r, config.lora_alpha) == (new.r, new.lora_alpha)
    assert set(config.target_modules) == new.target_modules


@pytest.mark.parametrize("kind", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_signs_elected_by_frequency(tmp_path, same_masks, kind):
    model, pairs = build(tmp_path)
    options = {"density": 0.7, "majority_sign_method": "frequency"}
    adapter, _ = combine_both(model, pairs, kind, **options)
    assert_equal(ours(adapter, "delta"), theirs(model, "new", "delta"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("cat", {}), ("svd", {}), ("svd", {"svd_rank": 2}), ("ties_svd", {"density": 0.5})],
)
def test_different_ranks(tmp_path, kind, options):
    model, pairs = build(tmp_path, ranks=(2, 4, 3))
    adapter, config = combine_both(model, pairs, kind, **options)
    assert_equal(ours(adapter, "delta"), theirs(model, "new", "delta"))
    assert config.r == model.peft_config["new"].r
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["a0", "a1", "a2"], WEIGHTS, "other", "linear")


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_rank_patterns(tmp_path, kind):
    """Ranks and alphas of their own, the same in every adapter, where PEFT too can add them."""
    patterns = {"rank_pattern": {"layers.1.q": 2}, "alpha_pattern": {"layers.0.q": 5}}
    model, pairs = build(tmp_path, fields=[{**own, **patterns} for own in FIELDS])
    adapter, _ = combine_both(model, pairs, kind)
    assert_equal(ours(adapter, "delta"), theirs(model, "new", "delta"))


def test_peft_loads_the_result(tmp_path):
    _, pairs = build(tmp_path)
    adapter, config = weighted_adapter(pairs, WEIGHTS, "cat", layouts=LAYOUTS)
    save_adapter(tmp_path / "new", adapter, config, layouts=LAYOUTS)
    model = peft.PeftModel.from_pretrained(Model(), tmp_path / "new")
    assert_equal(ours(adapter, "delta"), theirs(model, "default", "delta"))


def test_the_first_one_s_rslora_does_not_scale_the_result(tmp_path):
    """PEFT keeps `use_rslora` of the first, which makes its sum √r times too large."""
    model, pairs = build(tmp_path, fields=[{**FIELDS[0], "use_rslora": True}, *FIELDS[1:]])
    adapter, config = combine_both(model, pairs, "cat")
    assert not config.use_rslora and config.r == 12
    expected = {path: d / np.sqrt(12) for path, d in theirs(model, "new", "delta").items()}
    assert_equal(ours(adapter, "delta"), expected)


@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "ties", "magnitude_prune_svd"])
def test_an_embedding(kind):
    torch.manual_seed(0)
    alphas = {"a0": 5, "a1": 2}
    configs = {
        name: peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["e"], init_lora_weights=False)
        for name, alpha in alphas.items()
    }
    model = peft.get_peft_model(Table(), configs["a0"], adapter_name="a0")
    model.add_adapter("a1", configs["a1"])
    layer, pairs = model.base_model.model.e, []
    for name, alpha in alphas.items():
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        leaves = {
            "embedding_lora_A": jnp.asarray(a.detach().numpy().T),
            "embedding_lora_B": jnp.asarray(b.detach().numpy().T),
            "embedding_lora_scaling": jnp.float32(alpha / 3),
        }
        pairs.append(({"e": leaves}, LoraConfig(r=3, lora_alpha=alpha, target_modules=["e"])))
    options = {"density": 0.5} if kind not in ("svd", "cat", "linear") else {}
    model.add_weighted_adapter(["a0", "a1"], [0.6, -0.9], "new", kind, **options)
    adapter, _ = weighted_adapter(pairs, [0.6, -0.9], kind, **options)
    found = adapter["e"]["embedding_lora_A"] @ adapter["e"]["embedding_lora_B"]
    expected = layer.get_delta_weight("new").detach().numpy()
    assert_equal({"e": np.asarray(found)}, {"e": expected})
