"""Adapters on raw parameters of a mixture of experts compute, merge and are saved as PEFT's."""

import json
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import (  # noqa: E402
    InputError,
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
)
from lora_jax.adapters import delta_spectra, load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402
from tests import compiled  # noqa: E402

pytestmark = pytest.mark.oracle
EXPERTS, WIDTH, INNER, LAYERS, TOKENS = 3, 6, 5, 2, 7
X = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)
OUT_IN = ("td,efd->etf", "etf,edf->etd")
NAMES = ["experts.up", "experts.down", "experts.gate"]


class TheirExperts(torch.nn.Module):
    """Experts whose every token goes to all, by raw parameters alone."""

    def __init__(self, turned):
        super().__init__()
        self.is_transposed = turned
        shape = (lambda d_in, d_out: (d_in, d_out)) if turned else lambda d_in, d_out: (d_out, d_in)
        self.up = torch.nn.Parameter(0.3 * torch.randn(EXPERTS, *shape(WIDTH, INNER)))
        self.down = torch.nn.Parameter(0.3 * torch.randn(EXPERTS, *shape(INNER, WIDTH)))
        self.gate = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x):
        first, second = ("td,edf->etf", "etf,efd->etd") if self.is_transposed else OUT_IN
        inner = torch.tanh(torch.einsum(first, x, self.up))
        out = torch.einsum(second, inner, self.down)
        return torch.einsum("te,etd->td", (x @ self.gate.T).softmax(-1), out)


class TheirLayer(torch.nn.Module):
    def __init__(self, turned):
        super().__init__()
        self.experts = TheirExperts(turned)
        self.proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.proj(self.experts(x))


class Theirs(torch.nn.Module):
    def __init__(self, turned):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([TheirLayer(turned) for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


class Experts(nn.Module):
    turned: bool

    @nn.compact
    def __call__(self, x):
        def shape(d_in, d_out):
            return (EXPERTS, *((d_in, d_out) if self.turned else (d_out, d_in)))

        normal = nn.initializers.normal()
        up = self.param("up", normal, shape(WIDTH, INNER))
        down = self.param("down", normal, shape(INNER, WIDTH))
        gate = self.param("gate", normal, (EXPERTS, WIDTH))
        first = "td,edf->etf" if self.turned else "td,efd->etf"
        second = "etf,efd->etd" if self.turned else "etf,edf->etd"
        out = jnp.einsum(second, jnp.tanh(jnp.einsum(first, x, up)), down)
        return jnp.einsum("te,etd->td", nn.softmax(x @ gate.T), out)


class Layer(nn.Module):
    turned: bool

    @nn.compact
    def __call__(self, x, _):
        y = Experts(self.turned, name="experts")(x)
        return x + nn.Dense(WIDTH, use_bias=False, name="proj")(y), None


class Stack(nn.Module):
    turned: bool

    @nn.compact
    def __call__(self, x):
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return nn.scan(nn.remat(Layer), **axes)(self.turned, name="layers")(x, None)[0]


class Ours(nn.Module):
    turned: bool

    @nn.compact
    def __call__(self, x):
        return Stack(self.turned, name="model")(x)


def both(turned):
    """Their model, and ours with the same weights and its layouts."""
    torch.manual_seed(0)
    theirs = Theirs(turned)
    experts = {
        name: np.stack(
            [getattr(layer.experts, name).detach().numpy() for layer in theirs.model.layers]
        )
        for name in ("down", "gate", "up")  # sorted, as jit leaves a tree
    }
    proj = np.stack([layer.proj.weight.detach().numpy().T for layer in theirs.model.layers])
    params = {"model": {"layers": {"experts": experts, "proj": {"kernel": proj}}}}
    axis = (0,) if turned else (1,)
    rules = {
        "model/layers/experts/up": KernelLayout(axis, experts=True),
        "model/layers/experts/down": KernelLayout(axis, experts=True),
        "model/layers/experts/gate": KernelLayout((1,)),
    }
    model = lora_linen(Ours(turned), layouts=rules)
    layouts = model.layouts(params, X)
    assert layouts["model/layers/experts/up"].stack == "model/layers"
    return theirs, lora_linen(Ours(turned), layouts=layouts), params, layouts


def close(ours, theirs):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


FIELDS: dict[str, dict[str, Any]] = {
    "plain": dict(target_parameters=NAMES, target_modules=[]),
    "modules too": dict(target_parameters=NAMES, target_modules=["proj"]),
    "rslora": dict(target_parameters=NAMES[:2], target_modules=[], use_rslora=True),
    "patterns": dict(
        target_parameters=[*NAMES, "proj.weight"],
        target_modules=[],
        rank_pattern={"experts.up": 3, r"layers\.1\.experts\.down": 1, "gate": 3},
        alpha_pattern={r"layers\.0\.experts\.down": 9, "proj.weight": 3},
    ),
    "one layer": dict(
        target_parameters=["layers.1.experts.up", "experts.down"],
        target_modules=["proj"],
        layers_to_transform=[0],
        exclude_modules=["experts.up"],
    ),
}


TURNED = (False, True, False, True, False)
WAYS = pytest.mark.parametrize(
    ("fields", "turned"), list(zip(FIELDS.values(), TURNED, strict=True)), ids=list(FIELDS)
)


@WAYS
def test_what_peft_made_is_read(tmp_path, fields, turned):
    theirs, model, params, layouts = both(turned)
    config = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **fields)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path)
    adapter, read = load_adapter(
        tmp_path, params, layouts=layouts, parameter_order=["up", "down", "gate"]
    )
    assert adapter["model"]["layers"]["experts"]["up_lora_A"].shape[:3] == (LAYERS, EXPERTS, WIDTH)

    def loss(adapter):
        out = jax.jit(lambda p: model.apply({"params": p}, X))(combine(params, adapter))
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    expected = theirs(torch.from_numpy(X))
    close(out, expected)
    assert np.abs(out - compiled.apply(Ours(turned), params, X)).max() > 1e-2
    expected.sin().sum().backward()
    # As another adapter of the same config, gradients are saved and compared file by file.
    for path, leaf in adapter["model"]["layers"]["experts"].items():
        if path.endswith("scaling"):
            grads["model"]["layers"]["experts"][path] = leaf
    if "proj" in grads["model"]["layers"]:
        grads["model"]["layers"]["proj"]["lora_scaling"] = adapter["model"]["layers"]["proj"][
            "lora_scaling"
        ]
    save_adapter(tmp_path / "grads", grads, read, layouts=layouts)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, given = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("grads", "theirs")
    )
    assert ours.keys() == given.keys()
    for key in given:
        close(ours[key], given[key])


def load_file(path):
    from safetensors.numpy import load_file

    return load_file(path)


@WAYS
def test_what_we_save_peft_reads_and_merges_alike(tmp_path, fields, turned):
    theirs, model, params, layouts = both(turned)
    config = LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **fields)
    adapter = init_adapter(jax.random.key(1), params, config, layouts=layouts)
    save_adapter(tmp_path, adapter, config, layouts=layouts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert not [w for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    out = jax.jit(lambda p: model.apply({"params": p}, X))(combine(params, adapter))
    close(out, theirs(torch.from_numpy(X)))
    merged = merge_adapter(params, adapter, layouts=layouts)
    close(compiled.apply(Ours(turned), merged, X), np.asarray(out))
    plain = theirs.merge_and_unload()
    for name in ("up", "down", "gate"):
        for i, layer in enumerate(plain.model.layers):
            close(merged["model"]["layers"]["experts"][name][i], getattr(layer.experts, name))
    # Our own files say in which order parameters are nested.
    again, read = load_adapter(tmp_path, params, layouts=layouts)
    assert read.target_parameters == config.target_parameters
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    _check_spectra(tmp_path, params, merged)


def _check_spectra(directory, params, merged):
    found = [s for s in delta_spectra(directory) if "experts" in s.module]
    norms = [
        np.linalg.norm(delta)
        for name in ("up", "down", "gate")
        for new, old in [
            (merged["model"]["layers"]["experts"][name], params["model"]["layers"]["experts"][name])
        ]
        for layer in np.asarray(new) - old
        for delta in (layer if layer.ndim == 3 else [layer])
        if np.abs(delta).max() > 0
    ]
    assert np.allclose(sorted(s.norm for s in found), sorted(norms), rtol=1e-4)


def test_orders_that_shapes_do_not_tell(tmp_path):
    """`up` read with PEFT's idea of an input has the shapes of `down` read with ours."""
    theirs, _, params, layouts = both(False)
    config = peft.LoraConfig(
        r=2, target_parameters=["experts.down", "experts.up"], target_modules=[],
        init_lora_weights=False,
    )  # fmt: skip
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="fit in several orders; pass parameter_order"):
        load_adapter(tmp_path, params, layouts=layouts)
    with pytest.raises(InputError, match="lacks 'down'"):
        load_adapter(tmp_path, params, layouts=layouts, parameter_order=["up"])
    with pytest.raises(InputError, match="another base"):
        load_adapter(tmp_path, params, layouts=layouts, parameter_order=["down", "up"])
    load_adapter(tmp_path, params, layouts=layouts, parameter_order=["up", "down"])


def _mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    fields: dict[str, Any] = dict(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS
    )
    return MixtralExperts(transformers.MixtralConfig(**fields)), (1,)


def _gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    fields: dict[str, Any] = dict(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_local_experts=EXPERTS
    )
    return GptOssExperts(transformers.GptOssConfig(**fields)), (0,)


@pytest.mark.parametrize("make", [_mixtral, _gpt_oss])
def test_experts_of_transformers(tmp_path, make):
    """Their orientation and order of declaration, told by shapes alone, a square one included."""
    experts, axis = make()
    torch.manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    model = torch.nn.Module()
    model.experts = experts
    names = ("gate_up_proj", "down_proj")
    base = {"experts": {n: getattr(experts, n).detach().numpy().copy() for n in sorted(names)}}
    config = peft.LoraConfig(
        r=2, lora_alpha=5, init_lora_weights=False, target_modules=[],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    layouts = {"experts": KernelLayout(axis, experts=True)}
    adapter, _ = load_adapter(tmp_path, base, layouts=layouts)
    merged = merge_adapter(base, adapter, layouts=layouts)
    plain = theirs.merge_and_unload()
    for name in names:
        close(merged["experts"][name], getattr(plain.experts, name))


def test_the_config_says_that_no_module_is_meant(tmp_path):
    base = {"mlp": {"w": jnp.zeros((3, 4, 5)), "kernel": jnp.zeros((4, 5))}}
    layouts = {"mlp/w": KernelLayout((0,), experts=True)}
    config = LoraConfig(r=4, target_parameters=["mlp.w", "mlp.kernel"])
    adapter = init_adapter(jax.random.key(0), base, config, layouts=layouts)
    save_adapter(tmp_path, adapter, config, layouts=layouts)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == []
    assert said["target_parameters"] == ["mlp.w", "mlp.weight"]
