"""Starts from singular vectors and from an orthogonal basis, beside PEFT's."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import LoraConfig, init_olora, init_pissa  # noqa: E402

pytestmark = pytest.mark.oracle


def test_pissa_equals_peft():
    kernel = np.random.default_rng(0).standard_normal((64, 48), np.float32)
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data = torch.from_numpy(kernel.T.copy())
    theirs = peft.get_peft_model(
        torch.nn.Sequential(linear),
        peft.LoraConfig(r=8, lora_alpha=24, target_modules=["0"], init_lora_weights="pissa"),
    ).base_model.model[0]
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["q"])
    moved, adapter = init_pissa({"q": {"kernel": jnp.asarray(kernel)}}, config)
    # Each is 8e-6 from a float64 decomposition: float32 is relative to the largest direction.
    largest = float(np.linalg.norm(kernel, 2))
    their_base = theirs.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(moved["q"]["kernel"], their_base, rtol=0, atol=1e-6 * largest)
    a, b = adapter["q"]["lora_A"], adapter["q"]["lora_B"]
    their_a = theirs.lora_A["default"].weight.detach().numpy().T
    their_b = theirs.lora_B["default"].weight.detach().numpy().T
    np.testing.assert_allclose(a @ b, their_a @ their_b, rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=0), np.linalg.norm(their_a, axis=0), rtol=1e-5
    )


def test_olora_equals_peft():
    kernel = np.random.default_rng(0).standard_normal((64, 48), np.float32)
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data = torch.from_numpy(kernel.T.copy())
    theirs = peft.get_peft_model(
        torch.nn.Sequential(linear),
        peft.LoraConfig(r=8, lora_alpha=24, target_modules=["0"], init_lora_weights="olora"),
    ).base_model.model[0]
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["q"])
    moved, adapter = init_olora({"q": {"kernel": jnp.asarray(kernel)}}, config)
    largest = float(np.linalg.norm(kernel, 2))
    pairs = [
        (moved["q"]["kernel"], theirs.base_layer.weight),
        (adapter["q"]["lora_A"], theirs.lora_A["default"].weight),
        (adapter["q"]["lora_B"], theirs.lora_B["default"].weight),
    ]
    for ours, their in pairs:
        expected = their.detach().numpy().T
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * largest)
