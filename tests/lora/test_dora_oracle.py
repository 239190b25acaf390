"""DoRA beside PEFT's: outputs, gradients, merges, with and without dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import LoraConfig, dora_linear, init_adapter, merge_adapter  # noqa: E402

pytestmark = pytest.mark.oracle
X = np.random.default_rng(1).standard_normal((5, 24), np.float32)
KERNEL = np.random.default_rng(0).standard_normal((24, 16), np.float32)


def pair(**fields):
    """PEFT's layer, and ours with the same factors."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16)
    linear.weight.data = torch.from_numpy(KERNEL.T.copy())
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["0"], use_dora=True, init_lora_weights=False, **fields
    )
    model = peft.get_peft_model(torch.nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.linspace(0.5, 2, 16)
    arrays = (layer.lora_A["default"].weight.T, layer.lora_B["default"].weight.T, magnitude)
    ours = [jnp.asarray(x.detach().numpy().copy()) for x in arrays]
    return model, layer, ours, layer.scaling["default"], linear.bias.detach().numpy()


@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients(rslora):
    model, layer, (a, b, m), scaling, bias = pair(use_rslora=rslora)
    weights = np.random.default_rng(2).standard_normal((5, 16), np.float32)
    x = torch.from_numpy(X).requires_grad_()
    y = model(x)
    (y * torch.from_numpy(weights)).sum().backward()
    theirs = [
        x.grad.numpy(),
        layer.lora_A["default"].weight.grad.numpy().T,
        layer.lora_B["default"].weight.grad.numpy().T,
        layer.lora_magnitude_vector["default"].weight.grad.numpy(),
    ]

    def loss(x, a, b, m):
        return jnp.sum(weights * (dora_linear(x, jnp.asarray(KERNEL), a, b, scaling, m) + bias))

    ours = jax.jit(dora_linear)(X, KERNEL, a, b, scaling, m) + bias
    expected = y.detach().numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(X, a, b, m)
    for got, want in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_dropout_keeps_the_base_s_own_output(monkeypatch):
    """With the very entries dropped that PEFT drops."""
    model, layer, (a, b, m), scaling, bias = pair(lora_dropout=0.5)
    kept = np.random.default_rng(3).random((5, 24)) < 0.5
    dropped = np.where(kept, X / 0.5, 0).astype(np.float32)
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    monkeypatch.setattr(
        torch.nn.Dropout, "forward", lambda self, x: torch.from_numpy(dropped.copy())
    )
    monkeypatch.setattr("lora_jax.lora._dora.drop", lambda x, key, rate: jnp.asarray(dropped))
    with torch.no_grad():
        expected = model.train()(torch.from_numpy(X)).numpy()
    key = jax.random.key(0)
    ours = dora_linear(
        jnp.asarray(X), jnp.asarray(KERNEL), a, b, scaling, m, dropout_key=key, dropout_rate=0.5
    )
    np.testing.assert_allclose(ours + bias, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_fresh_magnitude_and_a_merge():
    model, layer, (a, b, m), scaling, _ = pair()
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q"], use_dora=True)
    base = {"q": {"kernel": jnp.asarray(KERNEL)}}
    fresh = init_adapter(jax.random.key(0), base, config)
    # B is zero at first: a column has the length it has in the base.
    np.testing.assert_allclose(
        fresh["q"]["lora_magnitude"], np.linalg.norm(KERNEL, axis=0), rtol=1e-6
    )
    layer.merge()
    expected = layer.base_layer.weight.detach().numpy().T
    trained = {"q": {**fresh["q"], "lora_A": a, "lora_B": b, "lora_magnitude": m}}
    merged = merge_adapter(base, trained)["q"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
