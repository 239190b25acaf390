"""One step: its gradient is plain autodiff's, however the tokens are laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import LoraConfig, QuantConfig, combine, init_adapter, lora_linen
from lora_jax.data import fill_batch
from lora_jax.data._examples import Example
from lora_jax.models import CausalLM, load_pretrained
from lora_jax.optim import freeze_base
from lora_jax.train import init_state, make_step
from lora_jax.train._step import FIRST_SCALE, GROW_AFTER

LORA = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
WATCH = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
"""An optimizer that moves nothing and keeps the gradient as its state."""


@pytest.fixture(scope="module")
def tiny(base_dir):
    return load_pretrained(base_dir)


@pytest.fixture(scope="module")
def adapter(tiny):
    return init_adapter(jax.random.key(1), tiny.params, LORA, layouts=tiny.layouts)


def make_examples():
    generator = np.random.default_rng(0)
    examples = []
    for i, length in enumerate([9, 14, 7, 11]):
        ids = generator.integers(3, 300, length).astype(np.int32)
        examples.append(Example(ids, np.arange(length) > length // 3, i))
    return examples


def stacked(*batches):
    """Batches as a step takes them: (accumulate, batch, seq)."""
    names = [name for name in batches[0] if name != "rows"]
    return {name: np.stack([b[name] for b in batches]) for name in names}


def padded(examples=None, rows=4):
    examples = make_examples() if examples is None else examples
    return fill_batch([[e] for e in examples], batch_size=rows, seq_length=24)


# Unvectorized, as tests otherwise compile, a long sum rounds twice as much.
AS_RUNS_COMPILE = {"xla_backend_optimization_level": 3}


def gradient(step, adapter, base, batches):
    state, metrics = step(init_state(adapter, WATCH, jax.random.key(0)), base, batches)
    return state.opt_state, metrics


def assert_close(found, expected, tolerance=4e-6):
    """Relative to the norm, leaf by leaf; float32 sums in another order differ by up to 1e-6 on
    some processors and 2e-6 on others."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    paths = jax.tree.leaves_with_path(expected)
    for (path, e), f in zip(paths, jax.tree.leaves(found), strict=True):
        e, f = np.asarray(e, np.float64), np.asarray(f, np.float64)
        error = np.linalg.norm(e - f) / max(np.linalg.norm(e), 1e-30)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def step(tiny):
    """A step that keeps the gradient, compiled once for each shape."""
    made = make_step(lora_linen(tiny.module), WATCH)
    return jax.jit(made, donate_argnums=0, compiler_options=AS_RUNS_COMPILE)


@pytest.fixture(scope="module")
def plain_gradient(tiny, adapter):
    """Autodiff of the mean over all trained tokens, no chunks, no scan, no packing."""
    model, batch = lora_linen(tiny.module), jax.tree.map(jnp.asarray, padded())

    def loss(adapter):
        params = combine(tiny.params, adapter)
        ids, places = batch["input_ids"], (batch["positions"], batch["segment_ids"])
        logs = jax.nn.log_softmax(model.apply({"params": params}, ids, *places))
        picked = jnp.take_along_axis(logs[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch["loss_mask"][:, 1:]) / batch["loss_mask"].sum()

    return jax.jit(jax.value_and_grad(loss), compiler_options=AS_RUNS_COMPILE)(adapter)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_gradient_equals_plain_autodiff(tiny, adapter, step, plain_gradient, chunk):
    if chunk != 1024:
        step = make_step(lora_linen(tiny.module), WATCH, chunk=chunk)
    grads, metrics = gradient(step, adapter, tiny.params, stacked(padded()))
    loss, expected = plain_gradient
    np.testing.assert_allclose(float(metrics["loss"]), float(loss), rtol=1e-6)
    np.testing.assert_allclose(
        float(metrics["grad_norm"]), float(optax.tree.norm(expected)), rtol=1e-6
    )
    assert int(metrics["tokens"]) == padded()["loss_mask"].sum() and bool(metrics["finite"])
    assert_close(grads, expected)


def test_gradient_is_the_same_however_tokens_are_spread(tiny, adapter, step, plain_gradient):
    examples = make_examples()
    for batches in (
        stacked(padded(examples[:2], 2), padded(examples[2:], 2)),
        # An uneven split: a mean of the batches' means would weigh its tokens wrongly.
        stacked(padded(examples[:1], 3), padded(examples[1:], 3)),
        stacked(fill_batch([examples[:2], examples[2:]], batch_size=2, seq_length=24)),
    ):
        grads, _ = gradient(step, adapter, tiny.params, batches)
        assert_close(grads, plain_gradient[1])


def test_gradient_ignores_what_is_not_trained_on(tiny, adapter, step):
    batch = padded()
    # The last token of a row is an input to nothing: as a target it counts only if trained on.
    last = np.array([len(e) - 1 for e in make_examples()])
    batch["loss_mask"][np.arange(4), last] = False
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][np.arange(4), last] += 1
    one, _ = gradient(step, adapter, tiny.params, stacked(batch))
    other, _ = gradient(step, adapter, tiny.params, stacked(changed))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("policy", ["nothing", "dots"])
def test_rematerialization_changes_no_gradient(tiny, adapter, plain_gradient, policy):
    model = lora_linen(CausalLM(tiny.config, remat=policy))
    grads, _ = gradient(make_step(model, WATCH), adapter, tiny.params, stacked(padded()))
    assert_close(grads, plain_gradient[1])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_trains_the_adapter_over_a_quantized_base(base_dir, dtype):
    tiny = load_pretrained(base_dir, quant=QuantConfig(), dtype=dtype)
    adapter = init_adapter(jax.random.key(1), tiny.params, LORA, layouts=tiny.layouts)
    tx = freeze_base(optax.adam(1e-2))
    step = make_step(lora_linen(tiny.module), tx)
    before = jax.tree.map(np.array, tiny.params)
    state, batches, losses = init_state(adapter, tx, jax.random.key(0)), stacked(padded()), []
    sizes = {leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert sizes <= {leaf.size for leaf in jax.tree.leaves(adapter)}
    for _ in range(10):
        state, metrics = step(state, tiny.params, batches)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert step._cache_size() == 1  # type: ignore[attr-defined]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, tiny.params))
    scaling = adapter["model"]["layers"]["mlp"]["up_proj"]["lora_scaling"]
    moved = state.trainable["model"]["layers"]["mlp"]["up_proj"]["lora_scaling"]
    np.testing.assert_array_equal(scaling, moved)


def test_donates_the_state_but_neither_the_adapter_nor_the_base(tiny, adapter, step):
    state = init_state(adapter, WATCH, jax.random.key(0))
    step(state, tiny.params, stacked(padded()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapter, tiny.params)))


def test_dropout_is_new_in_every_step_and_the_same_for_one_key(tiny, adapter):
    step = make_step(lora_linen(tiny.module), WATCH, dropout=0.5)

    def losses(seed):
        state, found = init_state(adapter, WATCH, jax.random.key(seed)), []
        for _ in range(3):
            state, metrics = step(state, tiny.params, stacked(padded()))
            found.append(float(metrics["loss"]))
        return found

    assert losses(0) == losses(0) and len({*losses(0), *losses(1)}) == 6


@pytest.fixture(scope="module")
def half(tiny):
    config = dataclasses.replace(LORA, adapter_dtype="float16")
    return init_adapter(jax.random.key(1), tiny.params, config, layouts=tiny.layouts)


def test_float16_gradient_is_that_of_float32(tiny, half, step, plain_gradient):
    grads, metrics = gradient(step, half, tiny.params, stacked(padded()))
    assert float(metrics["loss_scale"]) == FIRST_SCALE
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert_close(grads, plain_gradient[1], 2e-3)


def test_float16_recovers_from_an_overflow(tiny, half, step):
    state = init_state(half, WATCH, jax.random.key(0))
    state = dataclasses.replace(state, loss_scale=jnp.float32(2.0**24))
    before, scales, finite = jax.tree.map(np.array, half), [], []
    for _ in range(12):
        state, metrics = step(state, tiny.params, stacked(padded()))
        scales.append(float(metrics["loss_scale"]))
        finite.append(bool(metrics["finite"]))
        assert np.isfinite(metrics["loss"])
    overflows = finite.index(True)
    assert overflows > 0 and all(finite[overflows:])
    assert scales == [2.0 ** max(24 - i, 24 - overflows) for i in range(12)]
    jax.tree.map(np.testing.assert_array_equal, before, state.trainable)


def test_loss_scale_grows_after_many_good_steps(tiny, half, step):
    state = init_state(half, WATCH, jax.random.key(0))
    state = dataclasses.replace(state, good_steps=jnp.int32(GROW_AFTER - 1))
    state, _ = step(state, tiny.params, stacked(padded()))
    assert (float(state.loss_scale), int(state.good_steps)) == (2 * FIRST_SCALE, 0)


def test_only_float16_is_scaled(tiny, adapter):
    state = init_state(adapter, WATCH, jax.random.key(0))
    assert float(state.loss_scale) == 1.0
    activations = init_state(adapter, WATCH, jax.random.key(0), dtype="float16")
    assert float(activations.loss_scale) == FIRST_SCALE


def test_step_that_is_not_finite_changes_nothing(tiny, adapter, step):
    state = init_state(adapter, WATCH, jax.random.key(0))
    state, _ = step(state, tiny.params, stacked(padded()))
    before = jax.tree.map(np.array, (state.trainable, state.opt_state))
    norm = {"model": {"norm": {"weight": jnp.full(tiny.config.hidden_size, jnp.nan)}}}
    state, metrics = step(state, combine(tiny.params, norm), stacked(padded()))
    assert not bool(metrics["finite"]) and int(state.step) == 2 and float(state.loss_scale) == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt_state))
