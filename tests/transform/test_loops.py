"""Adapters in training loops that others wrote: one tree or two, with and without jit."""

import dataclasses

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, PartitionSpec

from lora_jax import (
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    optim,
    partition,
    quantize,
    stack_adapters,
    take_adapter,
    trainable_mask,
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="up")(x))
        return nn.Dense(4, name="head")(nn.LayerNorm(name="norm")(x))


X = jax.random.normal(jax.random.key(3), (8, 6))
Y = jax.random.randint(jax.random.key(4), (8,), 0, 4)
MODEL = lora_linen(Model())
BASE = jax.jit(Model().init)(jax.random.key(0), X)["params"]
CONFIG = LoraConfig(r=2, target_modules=["up", "head"], lora_alpha=8)


def new_adapter(seed=1):
    return init_adapter(jax.random.key(seed), BASE, CONFIG)


def loss_of(params, x=X, y=Y, apply=MODEL.apply):
    logits = apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def adapter_loss(adapter, x=X, y=Y):
    return loss_of(combine(BASE, adapter), x, y)


def plain_loop(steps, seed=1, tx=None):
    """What all the others have to come to."""
    tx = tx or optim.freeze_base(optax.adam(1e-2))
    adapter = new_adapter(seed)
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state):
        updates, state = tx.update(jax.grad(adapter_loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter


def assert_close(tree, expected):
    chex.assert_trees_all_close(tree, expected, rtol=1e-5, atol=1e-6)


class Loops(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_train_state_over_one_tree(self):
        tx = optim.freeze_base(optax.adam(1e-2))
        params = combine(BASE, new_adapter())
        state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)

        @self.variant
        def step(state):
            loss, grads = jax.value_and_grad(loss_of)(state.params, apply=state.apply_fn)
            return state.apply_gradients(grads=grads), loss

        losses = []
        for _ in range(4):
            state, loss = step(state)
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        adapter, base = partition(state.params, lambda path: "lora_" in path)
        jax.tree.map(np.testing.assert_array_equal, base, BASE)
        assert_close(adapter, plain_loop(4))
        moments = jax.tree.leaves(state.opt_state)
        assert sum(x.size for x in moments) < 3 * sum(x.size for x in jax.tree.leaves(adapter))

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_mask_of_optax_s_own(self):
        params = combine(BASE, new_adapter())
        labels = jax.tree.map(lambda yes: "train" if yes else "freeze", trainable_mask(params))
        groups = {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}
        tx = optax.multi_transform(groups, labels)
        state = tx.init(params)
        step = self.variant(lambda p, s: tx.update(jax.grad(loss_of)(p), s, p))
        for _ in range(3):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        adapter, base = partition(params, lambda path: "lora_" in path)
        jax.tree.map(np.testing.assert_array_equal, base, BASE)
        assert_close(adapter, plain_loop(3))

    @chex.variants(with_jit=True, without_jit=True)
    def test_many_adapters_under_vmap(self):
        tx = optim.freeze_base(optax.sgd(0.1))
        many = stack_adapters([new_adapter(seed) for seed in (1, 2, 3)])

        def step(adapter):
            updates, _ = tx.update(jax.grad(adapter_loss)(adapter), tx.init(adapter), adapter)
            return optax.apply_updates(adapter, updates)

        moved = self.variant(jax.vmap(step))(many)
        for slot, seed in enumerate((1, 2, 3)):
            own = plain_loop(1, seed, tx=tx)
            assert_close(take_adapter(moved, slot, like=own), own)

    @chex.variants(with_jit=True, without_jit=True)
    def test_merged_inside_the_loop(self):
        adapter = plain_loop(2)
        logits = self.variant(lambda a: Model().apply({"params": merge_adapter(BASE, a)}, X))
        assert_close(logits(adapter), MODEL.apply({"params": combine(BASE, adapter)}, X))


def test_donated_arrays():
    tx = optim.freeze_base(optax.adam(1e-2))
    adapter = new_adapter()
    state = tx.init(adapter)

    def step(adapter, state):
        updates, state = tx.update(jax.grad(adapter_loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        before = adapter
        adapter, state = step(adapter, state)
    assert before["up"]["lora_A"].is_deleted()
    assert_close(adapter, plain_loop(3))


def test_gradients_of_several_batches():
    """Four batches of two rows are a batch of eight."""
    tx = optim.freeze_base(optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation())
    adapter = new_adapter()
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state, x, y):
        updates, state = tx.update(jax.grad(adapter_loss)(adapter, x, y), state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(2):
        for at in range(0, 8, 2):
            adapter, state = step(adapter, state, X[at : at + 2], Y[at : at + 2])
    assert_close(adapter, plain_loop(2))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_rows_over_a_mesh_by_hand(quantized, dora):
    """`jax.shard_map` sums the gradients of what is the same on all devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    kernels = {
        name: BASE[name] | {"kernel": quantize(BASE[name]["kernel"])} for name in ("up", "head")
    }
    base = BASE | kernels if quantized else BASE
    config = dataclasses.replace(CONFIG, use_dora=dora, init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), base, config)

    def loss(adapter, x, y):
        return loss_of(combine(base, adapter), x, y)

    def local(adapter, x, y):
        return jax.tree.map(lambda g: g / mesh.size, jax.grad(loss)(adapter, x, y))

    specs = dict(in_specs=(whole, rows, rows), out_specs=whole)
    grads = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(adapter, X, Y)
    assert_close(grads, jax.jit(jax.grad(loss))(adapter, X, Y))
