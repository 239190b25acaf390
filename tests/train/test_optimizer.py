"""The learning rate over the steps, clipping, and what the optimizer keeps state for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import trainable_mask
from lora_jax.optim import lora_fa, lora_plus, riemannian
from lora_jax.train import TrainSection, make_optimizer
from lora_jax.train._optimizer import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1])
def test_schedule_equals_its_formula(schedule, warmup):
    peak, steps = 3e-3, 100
    rate = learning_rate(TrainSection(learning_rate=peak, schedule=schedule, warmup=warmup), steps)
    rise = round(warmup * steps)
    for step in range(steps):
        done = (step - rise) / (steps - rise)
        fall = {
            "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }[schedule]
        expected = peak * ((step + 1) / rise if step < rise else fall)
        np.testing.assert_allclose(float(rate(step)), expected, rtol=2e-5)


def first_update(config, gradient):
    params = {"q": {"lora_A": jnp.ones(3), "kernel": jnp.ones(3)}}
    mask = lambda tree: {"q": {"lora_A": True, "kernel": False}}  # noqa: E731
    tx = make_optimizer(config, 10, mask)
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(lambda x: gradient * x, params), state, params)
    return updates["q"], state


def test_clipping_scales_the_trained_gradient_alone():
    # With beta1 = beta2 = 0, Adam divides by |g| + 1e-8: a clipped gradient of 1e-8 gives 1/2.
    norm = 1e-8 * math.sqrt(3)
    options = {"learning_rate": 1.0, "schedule": "constant", "beta1": 0.0, "beta2": 0.0}
    clipped, _ = first_update(TrainSection(clip_norm=norm, warmup=0.0, **options), 5.0)
    free, _ = first_update(TrainSection(clip_norm=None, warmup=0.0, **options), 5.0)
    np.testing.assert_allclose(clipped["lora_A"], -0.5, rtol=1e-4)
    np.testing.assert_allclose(free["lora_A"], -1.0, rtol=1e-4)
    assert not clipped["kernel"].any()


def test_weight_decay_pulls_towards_zero():
    options = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0.0}
    decayed, _ = first_update(TrainSection(weight_decay=0.5, **options), 0.0)
    np.testing.assert_allclose(decayed["lora_A"], -0.05, rtol=1e-6)


def test_frozen_leaves_have_no_state():
    _, state = first_update(TrainSection(), 1.0)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert [leaf.shape for leaf in arrays] == [(3,), (3,)]  # two moments of lora_A


def test_eight_bits_are_adam_8bit():
    options = {"learning_rate": 0.1, "warmup": 0.0, "weight_decay": 0.2, "clip_norm": None}
    tx = make_optimizer(
        TrainSection(optimizer="adamw_8bit", schedule="constant", **options),
        10,
        lambda tree: {"lora_A": True, "kernel": False},
    )
    params = {"lora_A": jnp.ones((64, 64)), "kernel": jnp.ones((64, 64))}
    grads = jax.tree.map(lambda x: 3 * x, params)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["lora_A"], -0.1 * (1 + 0.2), rtol=1e-5)
    assert not updates["kernel"].any()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 2.1 * 64 * 64


@pytest.mark.parametrize(
    ("name", "make", "option"),
    [
        ("lora_plus", lora_plus, {"ratio": 4.0}),
        ("lora_fa", lora_fa, {}),
        ("riemannian", riemannian, {"damping": 0.5}),
    ],
)
def test_loras_own_are_those_of_optim(name, make, option):
    options = {"learning_rate": 0.1, "weight_decay": 0.2}
    config = TrainSection(
        **{"optimizer": name, **options, **{f"{name}_{key}": x for key, x in option.items()}},
        schedule="constant", warmup=0.0, clip_norm=None,
    )  # fmt: skip
    a, b = jnp.arange(6.0).reshape(3, 2), jnp.arange(8.0).reshape(2, 4)
    adapter = {"q": {"lora_A": a, "lora_B": b, "lora_scaling": jnp.float32(2.0)}}
    grads = jax.tree.map(jnp.cos, adapter)
    tx, plain = make_optimizer(config, 10, trainable_mask), make(**options, **option)
    updates, _ = tx.update(grads, tx.init(adapter), adapter)
    expected, _ = plain.update(grads, plain.init(adapter), adapter)
    for factor in ("lora_A", "lora_B"):
        np.testing.assert_allclose(updates["q"][factor], expected["q"][factor], rtol=1e-5)
    assert updates["q"]["lora_B"].any() and not updates["q"]["lora_scaling"]
