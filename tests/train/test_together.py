"""Adapters trained in one step are the adapters that are trained alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import (
    InputError,
    KernelLayout,
    LoraConfig,
    QuantConfig,
    init_adapter,
    lora_linen,
    stack_adapters,
    take_adapter,
)
from lora_jax._tree import leaves_with_path
from lora_jax.models import CausalLM, ModelConfig, quantize_params
from lora_jax.optim import freeze_base
from lora_jax.train import (
    init_joint_state,
    init_state,
    make_joint_step,
    make_step,
    prepare,
    run,
    scale_by_own_rate,
    train_together,
)

LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
SHAPE = ModelConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def relative_difference(one, other):
    """‖one − other‖ / ‖other‖ of each leaf, the largest of them."""
    others = dict(leaves_with_path(other))
    assert dict(leaves_with_path(one)).keys() == others.keys()
    return max(
        float(np.linalg.norm(x - others[path]) / max(np.linalg.norm(others[path]), 1e-30))
        for path, x in leaves_with_path(jax.device_get(one))
    )


def member(make_config, i: int, train: dict, **lora):
    """Its own rank, alpha, scaling rule, learning rate and start, over the base that all share."""
    own = [{"r": 2, "lora_alpha": 6}, {"r": 3, "use_rslora": True, "init_lora_weights": "gaussian"}]
    lora = {"target_modules": ["q_proj", "down_proj"], **own[i], **lora}
    config = make_config(lora=lora, train={"learning_rate": [1e-3, 3e-3][i], **train})
    return dataclasses.replace(config, output=f"{config.output}-{i}")


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param((0, 0), id="shared rows", marks=pytest.mark.slow),
        pytest.param((0, 1), id="own rows"),
    ],
)
def test_jobs_end_as_they_would_alone(make_config, seeds):
    patterns: list[dict] = [{"rank_pattern": {"down_proj": 6}}, {}]
    configs = [
        member(make_config, i, {"steps": 4, "accumulate": 2, "seed": seeds[i]}, **patterns[i])
        for i in range(2)
    ]
    jobs = [prepare(config) for config in configs]
    for job, found in zip(jobs, train_together(jobs), strict=True):
        alone = run(job)
        assert relative_difference(found.adapter, alone.trainable) < 1e-5
        assert found.after.loss == pytest.approx(alone.after.loss, rel=1e-6)
        assert found.before.loss == pytest.approx(alone.before.loss, rel=1e-6)
        assert found.after.tokens == alone.after.tokens and found.steps == 4


def test_patience_keeps_what_a_run_alone_would_keep(make_config):
    # The second does not move at all: its first look stays its best.
    rates = (1e-2, 1e-12)
    configs = [
        member(make_config, i, {"eval_every": 1, "patience": 2, "steps": 5, "learning_rate": rate})
        for i, rate in enumerate(rates)
    ]
    jobs = [prepare(config) for config in configs]
    together, alone = train_together(jobs), [run(job) for job in jobs]
    assert [own.stopped_early for own in alone] == [False, True]
    for found, own in zip(together, alone, strict=True):
        assert found.after.loss == pytest.approx(own.after.loss, rel=1e-6)
        assert relative_difference(found.adapter, own.trainable) < 1e-5
    assert [found.steps for found in together] == [5, 1]


def test_one_that_diverges_leaves_the_others_alone(make_config):
    configs = [member(make_config, i, {"steps": 2}, r=2) for i in range(2)]
    broken, whole = (prepare(config) for config in configs)
    nan = jax.tree.map(lambda x: x * jnp.nan, broken.trainable)
    found = train_together([dataclasses.replace(broken, trainable=nan), whole])
    assert np.isnan(found[0].after.loss)
    assert relative_difference(found[1].adapter, run(whole).trainable) < 1e-5


@pytest.mark.parametrize(
    ("quant", "own_data"),
    [
        pytest.param(None, True, id="float32, own rows", marks=pytest.mark.slow),
        pytest.param(
            QuantConfig(block_size=32), False, id="nf4, shared rows", marks=pytest.mark.slow
        ),
    ],
)
def test_twenty_steps_equal_those_of_each_alone(quant, own_data):
    tx = freeze_base(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    joint, _, base, _, batch = joint_step_of(tx, 0, own_data=own_data)
    alone = make_step(lora_linen(CausalLM(SHAPE)), optax.chain(tx, scale_by_own_rate(1.0)))
    base = base if quant is None else quantize_params(base, quant)
    configs = [
        LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "k_proj", "down_proj"],
                   use_rslora=alpha == 5, rank_pattern={"k_proj": 1 + r})
        for r, alpha in ((1, 2), (4, 5))
    ]  # fmt: skip
    adapters = [
        init_adapter(jax.random.key(i), base, config, layouts=LAYOUTS)
        for i, config in enumerate(configs)
    ]
    rates = [1.0, 0.3]
    state = init_joint_state(adapters, tx, seeds=[0, 0], rates=rates)
    turned = [jax.tree.map(lambda x, i=i: jnp.roll(x, i, axis=-1), batch) for i in range(2)]
    turned = [own | {"positions": batch["positions"]} for own in turned]
    given = jax.tree.map(lambda *x: jnp.stack(x), *turned) if own_data else batch
    for _ in range(20):
        state, _ = joint(state, base, given)
    for i, (adapter, rate) in enumerate(zip(adapters, rates, strict=True)):
        # The rate is in the state alone, so that one program serves both.
        own = init_state(adapter, optax.chain(tx, scale_by_own_rate(rate)), jax.random.key(0))
        for _ in range(20):
            own, _ = alone(own, base, turned[i] if own_data else batch)
        found = take_adapter(state.trainable, i, adapter)
        assert relative_difference(own.trainable, adapter) > 1e-2
        assert relative_difference(found, own.trainable) < 1e-5


def joint_step_of(tx, count, dropout=0.0, **options):
    ids = jax.random.randint(jax.random.key(5), (1, 2, 6), 0, 24)
    base = CausalLM(SHAPE).init(jax.random.key(0), ids[0])["params"]
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapters = [
        init_adapter(jax.random.key(i), base, config, layouts=LAYOUTS) for i in range(count)
    ]
    ones = jnp.ones_like(ids)
    places = jnp.broadcast_to(jnp.arange(6), ids.shape)
    batch = {"input_ids": ids, "positions": places, "segment_ids": ones, "loss_mask": ones == 1}
    model = lora_linen(CausalLM(SHAPE))
    joint = make_joint_step(model, tx, dropout=dropout, **options)
    return joint, make_step(model, tx, dropout=dropout), base, adapters, batch


@pytest.mark.slow
def test_dropout_is_each_ones_own():
    tx = freeze_base(optax.sgd(0.1))
    joint, alone, base, adapters, batch = joint_step_of(tx, 2, dropout=0.5)
    state = init_joint_state([adapters[0]] * 2, tx, seeds=[3, 4], rates=[1.0, 1.0])
    found, _ = joint(state, base, batch)
    for i, seed in enumerate((3, 4)):
        own, _ = alone(init_state(adapters[0], tx, jax.random.key(seed)), base, batch)
        mine = jax.tree.map(lambda x, i=i: x[i], found.trainable)
        assert relative_difference(mine, own.trainable) < 1e-5
    halves = [jax.tree.map(lambda x, i=i: x[i], found.trainable) for i in range(2)]
    assert relative_difference(*halves) > 1e-3


def test_padding_stays_zero_and_the_base_is_not_copied():
    tx = freeze_base(optax.adamw(0.1, weight_decay=0.1))
    joint, _, base, adapters, batch = joint_step_of(tx, 3)
    state = init_joint_state(adapters, tx, seeds=[0] * 3, rates=[1.0] * 3, rank=8)
    lowered = joint.lower(state, base, batch)
    arguments = lowered.compile().memory_analysis().argument_size_in_bytes
    for _ in range(3):
        state, _ = joint(state, base, batch)
    for path, leaf in leaves_with_path(state.trainable):
        if path.endswith("lora_A"):
            assert not np.any(leaf[..., 2:]) and np.all(np.any(leaf[..., :2], axis=(-1, -2)))
        if path.endswith("lora_B"):
            assert not np.any(leaf[..., 2:, :])
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    # The state holds an adapter and Adam's two moments of it.
    assert arguments < size + 4 * sum(x.nbytes for x in jax.tree.leaves(state.trainable))


def test_a_rate_is_kept_in_the_state():
    tx = scale_by_own_rate(3.0)
    params = {"w": jnp.ones(2), "ids": jnp.ones(2, jnp.int32)}
    updates, state = tx.update(params, tx.init(params))
    assert updates["w"].tolist() == [3.0, 3.0] and updates["ids"].dtype == jnp.int32
    assert jax.tree.leaves(state) == [3.0]


def test_what_does_not_go_together_is_refused(message_of):
    one = {"q": {"lora_A": jnp.ones((4, 1)), "lora_B": jnp.ones((1, 6))}}
    other = {"k": one["q"]}
    wide = {"q": {"lora_A": jnp.ones((5, 1)), "lora_B": jnp.ones((1, 6))}}
    assert "k/lora_A is in one adapter" in message_of(stack_adapters, [one, other])
    assert "q/lora_A is float32[4, 1] and float32[5, 1]" in message_of(stack_adapters, [one, wide])
    assert "there is room for 0" in message_of(stack_adapters, [one], 0)
    assert "no adapter" in message_of(stack_adapters, [])
    with pytest.raises(InputError, match="equally many"):
        init_joint_state([one], optax.sgd(1.0), seeds=[1, 2], rates=[1.0])
