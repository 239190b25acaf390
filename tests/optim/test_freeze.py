"""Frozen leaves stay bit for bit as they are, and cost the optimizer nothing."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import combine, quantize, trainable_mask
from lora_jax.optim import freeze_base
from tests import compiled

KEY = jax.random.key(0)


def tree():
    kernel = jax.random.normal(KEY, (6, 4)).at[0, 0].set(-0.0).at[0, 1].set(1e-42)
    return {
        "q": {
            "kernel": kernel,
            "lora_A": jnp.ones((6, 2)),
            "lora_B": jnp.zeros((2, 4)),
            "lora_scaling": jnp.float32(2.0),
        },
        "norm": {"weight": jnp.array([-0.0, jnp.nan, jnp.inf], jnp.bfloat16)},
    }


def gradients(params):
    return jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)


def bits(x):
    return np.asarray(x).tobytes()


def steps(tx, params, count=5):
    """Training steps under jit; nothing but the transformation decides what moves."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params


def assert_frozen(before, after):
    for path in (("q", "kernel"), ("q", "lora_scaling"), ("norm", "weight")):
        assert bits(before[path[0]][path[1]]) == bits(after[path[0]][path[1]]), path
    assert bits(before["q"]["lora_A"]) != bits(after["q"]["lora_A"])


def test_optax_masked_alone_moves_frozen_weights():
    """Why `freeze_base` exists: the masked-out gradients come through as updates."""
    before = tree()
    after = steps(optax.masked(optax.adamw(0.1), trainable_mask), before, 1)
    assert bits(before["q"]["kernel"]) != bits(after["q"]["kernel"])
    np.testing.assert_allclose(after["q"]["kernel"], before["q"]["kernel"] + 0.5)


@pytest.mark.parametrize(
    "tx",
    [
        freeze_base(optax.sgd(0.1)),
        freeze_base(optax.adamw(0.1, weight_decay=0.1)),
        freeze_base(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))),
        optax.chain(optax.clip_by_global_norm(1.0), freeze_base(optax.adam(0.1))),
        freeze_base(optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=0.1)),
        freeze_base(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()),
        freeze_base(optax.inject_hyperparams(optax.adam)(learning_rate=0.1)),
    ],
    ids=["sgd", "adamw", "chain inside", "chain outside", "schedule", "accumulation", "injected"],
)
def test_frozen_leaves_are_unchanged_bit_for_bit(tx):
    before = tree()
    assert_frozen(before, steps(tx, before))


def test_the_trainable_leaves_move_as_without_the_base():
    params, tx = tree(), optax.adamw(0.1, weight_decay=0.1)
    factors = {k: params["q"][k] for k in ("lora_A", "lora_B")}
    expected, actual = steps(tx, factors), steps(freeze_base(tx), params)["q"]
    assert all(bits(expected[k]) == bits(actual[k]) for k in factors)


def test_no_state_for_frozen_leaves():
    params = tree()
    state = freeze_base(optax.adam(0.1)).init(params)
    trainable = params["q"]["lora_A"].nbytes + params["q"]["lora_B"].nbytes
    counter = 4
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * trainable + counter


def test_quantized_bases_with_integer_leaves():
    q = quantize(jax.random.normal(KEY, (64, 4)))
    before = {"q": {"kernel": q, "lora_A": jnp.ones((64, 2)), "lora_B": jnp.ones((2, 4))}}

    def loss(params):
        return sum(jnp.sum(p["lora_A"] @ p["lora_B"]) for p in params.values())

    tx = freeze_base(optax.adamw(0.1, weight_decay=0.1))
    gradient = jax.grad(loss, allow_int=True)(before)
    updates, _ = tx.update(gradient, tx.init(before), before)
    after = optax.apply_updates(before, updates)
    for old, new in zip(jax.tree.leaves(q), jax.tree.leaves(after["q"]["kernel"]), strict=True):
        assert old.dtype == new.dtype and bits(old) == bits(new)
    assert bits(before["q"]["lora_A"]) != bits(after["q"]["lora_A"])


def test_saved_modules_train_through_a_mask_of_their_own():
    params = tree()
    mask = {"q": dict.fromkeys(params["q"], False), "norm": {"weight": False}}
    mask["q"]["kernel"] = True
    after = steps(freeze_base(optax.sgd(0.1), lambda _: mask), params)
    assert bits(after["q"]["lora_A"]) == bits(params["q"]["lora_A"])
    assert bits(after["q"]["kernel"]) != bits(params["q"]["kernel"])


def test_gradients_of_another_tree_are_refused():
    params = tree()
    tx = freeze_base(optax.adam(0.1))
    with pytest.raises(AssertionError, match="trees 0 and 1 do not match"):
        tx.update(gradients({"q": params["q"]}), tx.init(params), params)


def test_training_the_adapter_leaves_the_base_alone():
    """The usual loop: gradients of the adapter only; the base is an argument like any other."""
    import flax.linen as nn

    from lora_jax import LoraConfig, init_adapter, lora_linen

    model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jax.random.normal(KEY, (5, 4))
    base = compiled.init(model, KEY, x)
    before = jax.tree.map(bits, base)
    adapter = init_adapter(KEY, base, LoraConfig(r=2, target_modules="all-linear"))
    tx = freeze_base(optax.adamw(0.05, weight_decay=0.1))

    def loss(adapter, base):
        out = compiled.apply(lora_linen(model), combine(base, adapter), x)
        return jnp.mean((out - 1) ** 2)

    @jax.jit
    def step(adapter, state, base):
        value, gradient = jax.value_and_grad(loss)(adapter, base)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, values = tx.init(adapter), []
    for _ in range(5):
        adapter, state, value = step(adapter, state, base)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert jax.tree.map(bits, base) == before
    assert float(adapter["layers_0"]["lora_scaling"]) == 4.0


def test_the_structure_of_the_tree_is_kept():
    params = flax.core.freeze({**tree(), "unused": {}})
    after = steps(freeze_base(optax.adam(0.1)), params, 2)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert_frozen(params, after)


def test_what_it_wraps_may_read_the_frozen_weights():
    """Those of every `freeze_base` around it, unless there are no weights at all."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((params, extra.get("frozen_params")))
        return updates, state

    reader = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    inner = freeze_base(reader, lambda p: {"q": {name: name == "lora_B" for name in p["q"]}})
    params = {"q": tree()["q"]}
    tx = freeze_base(optax.chain(optax.clip_by_global_norm(1.0), inner))
    for weights in (params, None):
        tx.update(gradients(params), tx.init(params), weights)
    (read, frozen), nothing = seen
    assert list(read["q"]) == ["lora_B"]
    assert sorted(frozen["q"]) == ["kernel", "lora_A", "lora_scaling"]
    assert frozen["q"]["kernel"] is params["q"]["kernel"] and nothing == (None, None)
