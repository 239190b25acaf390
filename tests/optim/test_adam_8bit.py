"""8-bit Adam: what it keeps, how close it stays to float32 Adam, where it can be used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import InputError
from lora_jax.optim import adam_8bit, freeze_base, scale_by_adam_8bit
from lora_jax.optim._adam_8bit import Bytes, _to_floats, to_bytes

KEY = jax.random.key(0)


def tree(dtype="float32"):
    """One leaf of whole blocks, one that ends within a block, one that stays float32."""
    shapes = {"whole": (64, 64), "odd": (71, 59), "small": (64,)}
    keys = jax.random.split(KEY, len(shapes))
    leaves = zip(shapes.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape).astype(dtype) for (name, shape), key in leaves}


def fit(tx, params, count, scales=1.0):
    """Steps down `sum(scales·x²)/2`, with noise in the gradient, all inside one scan."""

    def step(carry, key):
        params, state = carry
        noise = jax.tree.map(lambda x: 0.01 * jax.random.normal(key, x.shape), params)
        grads = jax.tree.map(lambda x, n: (scales * (x + n)).astype(x.dtype), params, noise)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), jax.random.split(KEY, count))[0])
    return run(params, tx.init(params))


def norm(params):
    return float(optax.tree.norm(jax.tree.map(jnp.float32, params)))


@pytest.mark.parametrize("scales", [1.0, 1e-6, 1e4])
def test_converges_as_float32_adam_does(scales):
    rate = optax.cosine_decay_schedule(0.05, 150)
    start = norm(tree())
    ours, _ = fit(adam_8bit(rate), tree(), 150, scales)
    exact, _ = fit(optax.adam(rate), tree(), 150, scales)
    assert norm(exact) < 0.05 * start
    assert norm(ours) < 0.06 * start
    difference = jax.tree.map(jnp.subtract, ours, exact)
    assert norm(difference) < 0.03 * start


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_first_step_is_that_of_adam(weight_decay):
    """Nothing has been rounded yet."""
    params = tree()
    ours, exact = (
        adam_8bit(0.1, weight_decay=weight_decay),
        optax.adamw(0.1, weight_decay=weight_decay),
    )
    one, _ = jax.jit(ours.update)(params, ours.init(params), params)
    other, _ = jax.jit(exact.update)(params, exact.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5), one, other)


def test_small_leaves_are_those_of_adam():
    params = tree()
    ours, _ = fit(adam_8bit(0.01, min_8bit_size=10**6), params, 20)
    exact, _ = fit(optax.adam(0.01), params, 20)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bytes_of_the_state():
    params = {"kernel": jnp.ones((512, 300)), "lora_A": jnp.ones((300, 16))}
    size = sum(x.size for x in jax.tree.leaves(params))
    state = adam_8bit(1e-3).init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) <= 2.1 * size
    assert sum(x.nbytes for x in jax.tree.leaves(optax.adam(1e-3).init(params))) >= 8 * size
    assert adam_8bit(1e-3).init(tree())[0].mu["small"].dtype == jnp.float32


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (255,), (256,), (257,), (5, 103)])
def test_rounding_stays_within_half_a_part(signed, shape):
    """Of a decade's 64 (signed) or 128 parts at the top, and of fewer further down."""
    x = jax.random.normal(KEY, shape)
    x = x if signed else x**2

    @jax.jit
    def there_and_back(x):
        stored = to_bytes(x, signed=signed)
        return stored, jnp.abs(_to_floats(stored, signed=signed) - x)

    stored, error = there_and_back(x)
    assert stored.codes.shape == shape and stored.absmax.shape == (-(-x.size // 256),)
    assert error.max() <= stored.absmax.max() * 0.9 / (128 if signed else 256) * 1.001
    assert jnp.all(error <= jnp.abs(x) * 0.5 + stored.absmax.max() * 3e-7)


def test_zeros_stay_zeros():
    zeros = jnp.zeros(300)
    for signed in (True, False):
        np.testing.assert_array_equal(_to_floats(to_bytes(zeros, signed=signed), signed=signed), 0)
    tx = adam_8bit(0.1, min_8bit_size=0)
    updates, _ = tx.update(zeros, tx.init(zeros))
    np.testing.assert_array_equal(updates, 0)


def test_what_is_not_finite_shows():
    tx = adam_8bit(0.1, min_8bit_size=0)
    gradient = jnp.ones(300).at[7].set(jnp.nan)
    updates, state = tx.update(gradient, tx.init(gradient))
    assert np.isnan(updates[7]) and np.isnan(state[0].mu.absmax[0])


def test_jit_keeps_structure_and_donates():
    params = tree()
    tx = adam_8bit(optax.linear_schedule(0.1, 0.0, 10))
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=1)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    _, after = step(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after[0].count) == 1


def test_update_needs_no_temporary_as_large_as_a_float32_moment():
    params = jnp.zeros((1024, 256))
    tx = scale_by_adam_8bit()
    state = tx.init(params)
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * params.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_params_keep_their_type(dtype):
    after, state = fit(adam_8bit(0.03), tree(dtype), 100)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {
        jnp.dtype("uint8"),
        jnp.dtype("float32"),
    }
    assert norm(after) < 0.2 * norm(tree())


def test_inside_other_transformations():
    params = {"q": {"kernel": jnp.ones((64, 64)), "lora_A": jnp.ones((64, 64))}}
    injected = optax.inject_hyperparams(
        adam_8bit, static_args=("b1", "b2", "eps", "weight_decay", "min_8bit_size")
    )
    for tx in (
        optax.MultiSteps(adam_8bit(0.1), 2).gradient_transformation(),
        optax.chain(optax.clip_by_global_norm(1.0), adam_8bit(0.1, weight_decay=0.1)),
        injected(learning_rate=0.1),
    ):
        after, state = fit(freeze_base(tx), params, 4)
        np.testing.assert_array_equal(after["q"]["kernel"], 1)
        assert np.all(after["q"]["lora_A"] < 1)
        kept = [
            x
            for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Bytes))
            if isinstance(x, Bytes)
        ]
        assert [x.codes.shape for x in kept] == [(64, 64)] * 2


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"b1": 1.0}, "b1 must be at least 0 and below 1, got 1.0"),
        ({"b2": -0.1}, "b2 must be at least 0 and below 1, got -0.1"),
        ({"eps": -1e-8}, "eps must be a number of at least 0, got -1e-08"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0, got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be a number of at least 0, got -1.0"),
        ({"min_8bit_size": -1}, "min_8bit_size must be a number of at least 0, got -1"),
    ],
)
def test_refuses(options, found):
    with pytest.raises(InputError, match=f"^adam_8bit: {found}$"):
        adam_8bit(**{"learning_rate": 0.1, **options})
