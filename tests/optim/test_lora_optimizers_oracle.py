"""Adapters after steps of LoRA+, LoRA-FA and Riemannian AdamW equal PEFT's.

All gradients are torch's, of a loss at PEFT's own parameters; ours follow by themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.optimizers import (  # noqa: E402
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

from lora_jax.optim import freeze_base, lora_fa, lora_plus, riemannian  # noqa: E402

pytestmark = pytest.mark.oracle

STEPS = 12
RATE = 0.01
BETAS = (0.9, 0.99)
"""In float32, optax's 1 - 0.999 is off by a part in 60,000."""
NAMES = ("first", "second")


def make_theirs(**config):
    """Two adapted layers of different shapes, alpha ≠ r, A and B as they are in training."""
    torch.manual_seed(0)
    layers = {"first": torch.nn.Linear(24, 16), "second": torch.nn.Linear(16, 10)}
    model = torch.nn.Sequential()
    for name, module in layers.items():
        model.add_module(name, module)
    plain = {"r": 4, "lora_alpha": 6, "target_modules": list(NAMES), "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**plain, **config}))


def adapter_of(model, value=lambda p: p):
    """Our tree of a value of their parameters, transposed."""
    tree = {}
    for name in NAMES:
        module = getattr(model.base_model.model, name)
        tree[name] = {
            factor: jnp.asarray(value(getattr(module, factor).default.weight).detach().numpy().T)
            for factor in ("lora_A", "lora_B")
        }
        tree[name]["lora_scaling"] = jnp.float32(module.scaling["default"])
    return tree


def their_gradients(model, seed):
    """Gradients of both factors, though PEFT freezes one: our tree holds both."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(32, 24)).astype(np.float32))
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    asked = [p.requires_grad for p in factors]
    for p in factors:
        p.requires_grad_(True)
    loss = (model(torch.tanh(x)) ** 2).mean()
    for p, grad, wanted in zip(factors, torch.autograd.grad(loss, factors), asked, strict=True):
        p.requires_grad_(wanted)
        p.grad = grad


def compare(tx, model, optimizer, rtol=1e-5):
    tx = freeze_base(tx)
    ours = adapter_of(model)
    start, state, update = ours, tx.init(ours), jax.jit(tx.update)
    worst = 0.0
    for step in range(STEPS):
        their_gradients(model, step)
        grads = adapter_of(model, lambda p: p.grad)
        optimizer.step()
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, theirs in adapter_of(model).items():
            for factor, value in theirs.items():
                error = jnp.linalg.norm(ours[name][factor] - value) / jnp.linalg.norm(value)
                worst = max(worst, float(error))
    assert worst < rtol
    return start, ours


def assert_moved(start, ours, factors=("lora_A", "lora_B")):
    for name in NAMES:
        for factor in factors:
            assert jnp.abs(ours[name][factor] - start[name][factor]).max() > STEPS * RATE / 4


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus(weight_decay):
    model = make_theirs()
    options = {"lr": RATE, "betas": BETAS, "loraplus_weight_decay": weight_decay}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=5.0, **options)
    ours = lora_plus(RATE, *BETAS, weight_decay=weight_decay, ratio=5.0)
    assert_moved(*compare(ours, model, theirs))


@pytest.mark.parametrize(("damping", "weight_decay"), [(1e-2, 0.1), (1.0, 0.0)])
def test_riemannian(damping, weight_decay):
    model = make_theirs()
    options = {"lr": RATE, "betas": BETAS, "reg": damping, "weight_decay": weight_decay}
    theirs = create_riemannian_optimizer(model, torch.optim.AdamW, **options)
    ours = riemannian(RATE, *BETAS, weight_decay=weight_decay, damping=damping)
    assert_moved(*compare(ours, model, theirs))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"second": 1}}])
def test_lora_fa(config, monkeypatch):
    """Theirs multiplies in bfloat16 where that can be, has its eps on the uncorrected moment, and
    takes the weight decay from the new weight: none of it is asked for here."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    model = make_theirs(**config)
    theirs = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=RATE)
    for group in theirs.param_groups:
        group.update(betas=BETAS, eps=1e-12)
    start, ours = compare(lora_fa(RATE, *BETAS, eps=1e-12), model, theirs)
    assert_moved(start, ours, ("lora_B",))
    for name in NAMES:
        np.testing.assert_array_equal(ours[name]["lora_A"], start[name]["lora_A"])
