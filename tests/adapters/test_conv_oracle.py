"""Convolutions beside PEFT's: files both ways, outputs, gradients, merged weights."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import (  # noqa: E402
    InputError,
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
)
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout, init_with_base, without_start  # noqa: E402
from tests import compiled  # noqa: E402

pytestmark = pytest.mark.oracle
KINDS = {
    "1 axis": (torch.nn.Conv1d, (3,), (9,)),
    "2 axes": (torch.nn.Conv2d, (3, 2), (7, 6)),
    "3 axes": (torch.nn.Conv3d, (2, 3, 1), (4, 5, 3)),
}
FIELDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "biases": {"lora_bias": True, "bias": "lora_only"},
    "whole": {"modules_to_save": ["whole"]},
}


class Theirs(torch.nn.Module):
    def __init__(self, kind, window, **options):
        super().__init__()
        self.first = kind(4, 6, window, **options)
        self.whole = kind(6, 5, window, padding="same")

    def forward(self, x):
        return self.whole(torch.tanh(self.first(x)))


class Ours(nn.Module):
    window: tuple
    options: dict

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, self.window, **self.options, name="first")(x)
        return nn.Conv(5, self.window, name="whole")(nn.tanh(x))


def features_last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def kernel_of(weight):
    return np.moveaxis(weight.detach().numpy(), (0, 1), (-1, -2))


def both(kind, window, size, **options):
    """A random pair of convolutions there, the same here, and an input for each."""
    torch.manual_seed(0)
    theirs = Theirs(kind, window, **options)
    given = {"strides": options.get("stride", 1), "padding": options.get("padding", 0)}
    given["kernel_dilation"] = options.get("dilation", 1)
    named = {"same": "SAME", "circular": "CIRCULAR"}
    given["padding"] = named.get(options.get("padding_mode", given["padding"]), given["padding"])
    ours = Ours(window, given)
    params = {
        name: {"kernel": jnp.asarray(kernel_of(x.weight)), "bias": jnp.asarray(x.bias.detach())}
        for name, x in theirs.named_children()
    }
    x = torch.randn(2, 4, *size)
    return theirs, ours, params, x, jnp.asarray(features_last(x))


@pytest.fixture(scope="module", params=[(k, f) for k in KINDS for f in FIELDS], ids="-".join)
def case(request, tmp_path_factory):
    """An adapter that PEFT made, and the same read by us."""
    kind, fields = request.param
    theirs, ours, params, x, own_x = both(*KINDS[kind], stride=2, padding=1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["first"], init_lora_weights=False, **FIELDS[fields]
    )
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter *= 1.0 + 0.3 * torch.rand_like(parameter)
    directory = tmp_path_factory.mktemp("case")
    model.save_pretrained(directory)
    layouts = lora_linen(ours).layouts(params, own_x)
    adapter, own = load_adapter(directory, params, layouts=layouts)
    return types.SimpleNamespace(
        model=model, directory=directory, ours=ours, params=params, layouts=layouts, x=x,
        own_x=own_x, adapter=adapter, config=own, name=request.param,
    )  # fmt: skip


def close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_outputs_gradients_and_merged_weights(case):
    adapted = lora_linen(case.ours)

    @jax.jit
    def loss(adapter):
        out = adapted.apply({"params": combine(case.params, adapter)}, case.own_x)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.grad(loss, has_aux=True)(case.adapter)
    expected = case.model(case.x)
    torch.sin(expected).sum().backward()
    close(out, features_last(expected.detach()))
    layer = case.model.base_model.model.first
    found, (a, b) = gradient["first"], (layer.lora_A.default, layer.lora_B.default)
    close(found["lora_A"], np.moveaxis(a.weight.grad.numpy(), 1, -1).reshape(3, -1).T)
    close(found["lora_B"], b.weight.grad.numpy().reshape(6, 3).T)
    if case.config.use_dora:
        close(found["lora_magnitude"], layer.lora_magnitude_vector.default.weight.grad.ravel())
    if case.config.lora_bias:
        close(found["lora_B_bias"], b.bias.grad)
    if case.config.modules_to_save:
        whole = case.model.base_model.model.whole.modules_to_save.default
        close(gradient["whole"]["kernel"], kernel_of(whole.weight.grad))
    merged = merge_adapter(case.params, case.adapter, layouts=case.layouts)
    close(case.ours.apply({"params": merged}, case.own_x), out)
    layer.merge()
    close(merged["first"]["kernel"], kernel_of(layer.base_layer.weight))
    close(merged["first"]["bias"], layer.base_layer.bias.detach())
    layer.unmerge()


def test_what_is_saved_here_is_theirs(case, tmp_path):
    directory = tmp_path / "ours"
    save_adapter(directory, case.adapter, case.config, layouts=case.layouts)
    kind = case.name[0]
    base, *_ = both(*KINDS[kind], stride=2, padding=1)
    again = peft.PeftModel.from_pretrained(base, directory).eval()
    with torch.no_grad():
        close(again(case.x), case.model(case.x))
    loaded, config = load_adapter(directory, case.params, layouts=case.layouts)
    assert config == case.config
    jax.tree.map(np.testing.assert_array_equal, loaded, case.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_as_wide_as_theirs(kind):
    theirs, ours, params, _, x = both(*KINDS[kind])
    config = LoraConfig(r=3, target_modules=["first"])
    layouts = lora_linen(ours).layouts(params, x)
    adapter = init_adapter(jax.random.key(0), params, config, layouts=layouts)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=3, target_modules=["first"]))
    a = model.base_model.model.first.lora_A.default.weight
    assert adapter["first"]["lora_A"].size == a.numel()
    bound = a[0].numel() ** -0.5  # uniform between this and its opposite
    for values in (adapter["first"]["lora_A"], a.detach().numpy()):
        assert 0.8 * bound < np.abs(values).max() <= bound


def peft_file(model, directory, **fields):
    """A random adapter of `first`, written by PEFT: the model with it, and what it computes."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["first"], init_lora_weights=False, **fields
    )
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(directory)
    return model


FORGOTTEN = {
    # Sizes at which an A without the dilation gives as many places as the base.
    "dilation": {"dilation": 2, "padding": "same"},
    "dilation and strides": {"dilation": 2, "padding": 1, "stride": 4},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", FORGOTTEN.values(), ids=FORGOTTEN)
def test_what_theirs_forgets(options, tmp_path):
    """PEFT's A has neither the dilation nor the kind of padding: adapted, it is another model."""
    theirs, ours, params, x, own_x = both(torch.nn.Conv2d, (3, 3), (8, 8), **options)
    model = peft_file(theirs, tmp_path)
    with torch.no_grad():
        adapted = features_last(model(x))
        merged = features_last(model.merge_and_unload()(x))
    assert np.abs(adapted - merged).max() > 0.1 * np.abs(merged).max()
    layouts = lora_linen(ours).layouts(params, own_x)
    adapter, _ = load_adapter(tmp_path, params, layouts=layouts)
    close(compiled.apply(lora_linen(ours), combine(params, adapter), own_x), merged)
    close(ours.apply({"params": merge_adapter(params, adapter, layouts=layouts)}, own_x), merged)


def test_dilation_at_other_sizes_which_theirs_cannot_run(tmp_path):
    theirs, ours, params, x, own_x = both(torch.nn.Conv2d, (3, 3), (8, 8), dilation=2)
    model = peft_file(theirs, tmp_path)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
        model(x)
    layouts = lora_linen(ours).layouts(params, own_x)
    adapter, _ = load_adapter(tmp_path, params, layouts=layouts)
    with torch.no_grad():
        merged = features_last(model.merge_and_unload()(x))
    close(compiled.apply(lora_linen(ours), combine(params, adapter), own_x), merged)


def test_groups_have_no_form_that_both_know(tmp_path):
    """PEFT's delta of a convolution with groups is none of these groups, and it cannot merge it."""
    theirs, _, _, x, own_x = both(torch.nn.Conv2d, (3, 3), (8, 8), groups=2)
    model = peft_file(theirs, tmp_path / "theirs")
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()
    ours = Ours((3, 3), {"feature_group_count": 2, "padding": 0})
    params = ours.init(jax.random.key(0), own_x)["params"]
    layouts = lora_linen(ours).layouts(params, own_x)
    with pytest.raises(InputError, match="load_adapter: first/kernel is a conv.* of 2 groups"):
        load_adapter(tmp_path / "theirs", params, layouts=layouts)
    config = LoraConfig(r=2, target_modules=["first"])
    adapter = init_adapter(jax.random.key(0), params, config, layouts=layouts)
    with pytest.raises(InputError, match="save_adapter: first/kernel is a conv.* of 2 groups"):
        save_adapter(tmp_path / "ours", adapter, config, layouts=layouts)
    assert not (tmp_path / "ours").exists()


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    theirs, ours, params, _, own_x = both(torch.nn.Conv2d, (3, 2), (8, 8))
    peft_file(theirs, tmp_path / "theirs")
    layouts = lora_linen(ours).layouts(params, own_x)
    other = both(torch.nn.Conv2d, (2, 3), (8, 8))[2]
    turned = {path: dataclasses.replace(x, window=(2, 3)) for path, x in layouts.items()}
    shape = r"first.lora_A.weight has shape \(2, 4, 3, 2\), this base needs \(2, 4, 2, 3\)"
    with pytest.raises(InputError, match=shape):
        load_adapter(tmp_path / "theirs", other, layouts=turned)
    with pytest.raises(InputError, match=r"first/kernel: its layout has the window \(2, 3\)"):
        load_adapter(tmp_path / "theirs", params, layouts=turned)
    with pytest.raises(InputError, match="first/kernel has 4 axes, and a shape alone"):
        load_adapter(tmp_path / "theirs", params)
    adapter, config = load_adapter(tmp_path / "theirs", params, layouts=layouts)
    wide = {"first/kernel": KernelLayout((0, 1, 2), window=(5, 5))}
    with pytest.raises(InputError, match=r"first/kernel has 24 inputs, .* window \(5, 5\)"):
        save_adapter(tmp_path / "ours", adapter, config, layouts=wide)


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_starts_that_theirs_knows_of_no_convolution(init, tmp_path):
    fields = {"r": 2, "target_modules": ["first"], "init_lora_weights": init}
    theirs, ours, params, _, own_x = both(torch.nn.Conv2d, (3, 2), (8, 8))
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.get_peft_model(theirs, peft.LoraConfig(**fields))
    layouts = lora_linen(ours).layouts(params, own_x)
    config = LoraConfig(**fields)
    base, adapter = init_with_base(jax.random.key(0), params, config, layouts=layouts)
    close(
        merge_adapter(base, adapter, layouts=layouts)["first"]["kernel"], params["first"]["kernel"]
    )
    with pytest.raises(InputError, match=f"first/kernel started with .*{init}.*no convolution"):
        save_adapter(tmp_path, adapter, config, layouts=layouts)
    if config.moves_base:
        adapter, config = without_start(adapter, adapter, config)
    save_adapter(tmp_path, adapter, config.with_usual_start(), layouts=layouts)
    again = peft.PeftModel.from_pretrained(theirs, tmp_path)
    close(kernel_of(again.merge_and_unload().first.weight), params["first"]["kernel"])
