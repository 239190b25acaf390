"""What PEFT cannot do with experts is what it does with each as a layer; starts are as wide."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import LoraConfig, combine, init_adapter, lora_linen, merge_adapter  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.lora import KernelLayout  # noqa: E402

pytestmark = pytest.mark.oracle
EXPERTS, WIDTH, INNER, TOKENS = 3, 6, 5, 7
X = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)


def close(ours, theirs):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(("turned", "rslora"), [(False, True), (True, False)])
def test_dora_is_that_of_each_expert_as_a_layer(tmp_path, turned, rslora):
    """PEFT has no DoRA on parameters; each expert as a linear layer of its own has."""
    rng = np.random.default_rng(2)
    shape = (WIDTH, INNER) if turned else (INNER, WIDTH)
    weight = rng.normal(size=(EXPERTS, *shape)).astype(np.float32)
    base = {"mlp": {"w": weight}}
    layouts = {"mlp/w": KernelLayout((0,) if turned else (1,), experts=True)}
    fields: dict[str, Any] = dict(
        r=2, lora_alpha=5, use_dora=True, use_rslora=rslora, init_lora_weights=False
    )
    config = LoraConfig(target_parameters=["mlp.w"], **fields)
    adapter = init_adapter(jax.random.key(3), base, config, layouts=layouts)
    own = adapter["mlp"]
    own["w_lora_magnitude"] = own["w_lora_magnitude"] * rng.uniform(0.5, 2, (EXPERTS, INNER))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            way = "td,edf->etf" if turned else "td,efd->etf"
            return jnp.einsum(way, x, Mlp(name="mlp")())

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("w", nn.initializers.normal(), weight.shape)

    model = lora_linen(Model(), layouts=layouts)

    def loss(adapter):
        out = model.apply({"params": combine(base, adapter)}, X)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    merged = merge_adapter(base, adapter, layouts=layouts)["mlp"]["w"]
    for e in range(EXPERTS):
        linear = torch.nn.Sequential(torch.nn.Linear(WIDTH, INNER, bias=False))
        one = weight[e].T if turned else weight[e]
        with torch.no_grad():
            linear[0].weight.copy_(torch.from_numpy(one.copy()))
        theirs = peft.get_peft_model(linear, peft.LoraConfig(target_modules=["0"], **fields))
        layer = theirs.base_model.model[0]
        parts = {
            "lora_A": (layer.lora_A["default"].weight, own["w_lora_A"][e].T),
            "lora_B": (layer.lora_B["default"].weight, own["w_lora_B"][e].T),
            "lora_magnitude": (
                layer.lora_magnitude_vector["default"].weight, own["w_lora_magnitude"][e]
            ),
        }  # fmt: skip
        with torch.no_grad():
            for parameter, value in parts.values():
                parameter.copy_(torch.from_numpy(np.array(value)))
        expected = theirs(torch.from_numpy(X))
        close(out[e], expected)
        expected.sin().sum().backward()
        for name, (parameter, _) in parts.items():
            close(grads["mlp"][f"w_{name}"][e].T, parameter.grad)
        plain = theirs.merge_and_unload()[0].weight.detach().numpy()
        close(merged[e], plain.T if turned else plain)
    # A file PEFT refuses rather than misreads.
    save_adapter(tmp_path, adapter, config, layouts=layouts)
    again, _ = load_adapter(tmp_path, base, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    holder = torch.nn.Module()
    holder.mlp = torch.nn.Module()
    holder.mlp.w = torch.nn.Parameter(torch.from_numpy(weight))
    with pytest.raises(ValueError, match="use_dora"):
        peft.PeftModel.from_pretrained(holder, tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_new_adapters_are_drawn_as_wide_as_peft_s(tmp_path, init):
    torch.manual_seed(0)
    experts, wide, rank = 50, 20, 4
    holder = torch.nn.Module()
    holder.mlp = torch.nn.Module()
    holder.mlp.w = torch.nn.Parameter(torch.zeros(experts, 10, wide))
    fields: dict[str, Any] = dict(
        r=rank, target_parameters=["mlp.w"], target_modules=[], init_lora_weights=init
    )
    theirs = peft.get_peft_model(holder, peft.LoraConfig(**fields)).base_model.model.mlp
    base = {"mlp": {"w": jnp.zeros((experts, 10, wide))}}
    layouts = {"mlp": KernelLayout((1,), experts=True)}
    own = init_adapter(jax.random.key(0), base, LoraConfig(**fields), layouts=layouts)["mlp"]
    for name, their in (("A", theirs.lora_A), ("B", theirs.lora_B)):
        values, given = np.asarray(own[f"w_lora_{name}"]), their["default"].weight
        assert values.size == given.numel()
        if init == "gaussian" or not np.any(values):
            assert np.isclose(values.std(), given.std().item(), rtol=0.05, atol=0)
        else:
            assert np.isclose(np.abs(values).max(), given.abs().max().item(), rtol=0.02)
