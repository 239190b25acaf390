"""State in host memory: where it is, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.optim import adam_8bit, freeze_base, offload_state

PARAMS = {
    "q": {
        "kernel": jnp.ones((64, 64)),
        "lora_A": jax.random.normal(jax.random.key(0), (64, 80)),
        "lora_B": jnp.zeros((3, 5), jnp.bfloat16),
    }
}
OPTIMIZERS = {
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1),
    "8 bits": optax.chain(optax.clip_by_global_norm(1.0), adam_8bit(0.1, weight_decay=0.1)),
    "accumulation": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def kinds(state):
    """Memory kinds of the arrays and of the scalars."""
    leaves = jax.tree.leaves(state)
    return tuple(
        {x.sharding.memory_kind for x in leaves if bool(x.ndim) is a} for a in (True, False)
    )


def make_step(tx):
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x + 1).astype(x.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.fixture(params=OPTIMIZERS)
def tx(request):
    return freeze_base(OPTIMIZERS[request.param])


def test_updates_are_the_same_bit_for_bit(tx):
    offloaded = offload_state(tx)
    one, other = copy(PARAMS), copy(PARAMS)
    state, on_host = tx.init(one), offloaded.init(other)
    plain, step = make_step(tx), make_step(offloaded)
    for _ in range(4):
        one, state = plain(one, state)
        other, on_host = step(other, on_host)
        assert kinds(on_host) == ({"pinned_host"}, {"device"})
    assert kinds(state) == ({"device"}, {"device"})
    assert {x.sharding.memory_kind for x in jax.tree.leaves(other)} == {"device"}
    assert jax.tree.structure(state) == jax.tree.structure(on_host)
    jax.tree.map(np.testing.assert_array_equal, (one, state), (other, on_host))


def test_compiled_step_takes_and_leaves_the_state_on_the_host(tx):
    offloaded = offload_state(tx)
    state = offloaded.init(PARAMS)
    compiled = make_step(offloaded).lower(PARAMS, state).compile()
    params_in, state_in = compiled.input_shardings[0]
    params_out, state_out = compiled.output_shardings
    expected = jax.tree.map(lambda x: x.sharding.memory_kind, state)
    assert "pinned_host" in jax.tree.leaves(expected)
    for found in (state_in, state_out):
        assert jax.tree.map(lambda sharding: sharding.memory_kind, found) == expected
    for found in (params_in, params_out):
        assert {sharding.memory_kind for sharding in jax.tree.leaves(found)} == {"device"}


def test_donates_the_state():
    tx = offload_state(optax.adam(0.1))
    state = tx.init(PARAMS)
    make_step(tx)(copy(PARAMS), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_passes_extra_arguments_on():
    tx = offload_state(optax.scale_by_polyak())
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.float32(2.0))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
