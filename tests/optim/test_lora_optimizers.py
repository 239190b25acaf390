"""LoRA+, LoRA-FA and Riemannian preconditioning: formulas, stacks, padding, what may wrap them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import InputError, LoraConfig, init_adapter
from lora_jax.lora import KernelLayout
from lora_jax.optim import (
    freeze_base,
    lora_fa,
    lora_plus,
    riemannian,
    scale_by_lora_fa,
    scale_by_riemannian,
    scale_lora_b,
)
from lora_jax.optim._factors import solve_gram

MAKERS = [lora_plus, lora_fa, riemannian]
STATELESS = optax.EmptyState()


def layer(seed=0, d_in=12, rank=3, d_out=7, scaling=1.5):
    """Factors, neither of them zero."""
    keys = jax.random.split(jax.random.key(seed), 2)
    a, b = jax.random.normal(keys[0], (d_in, rank)), jax.random.normal(keys[1], (rank, d_out))
    return {"lora_A": a, "lora_B": b, "lora_scaling": jnp.float32(scaling)}


def gradient(adapter, target=0.5):
    """Of half the squared distance of every `scaling·A·B` from a constant."""

    def loss(adapter):
        deltas = [p["lora_scaling"][..., None, None] * p["lora_A"] @ p["lora_B"] for p in adapter]
        return sum(jnp.sum((delta - target) ** 2) / 2 for delta in deltas)

    return jax.grad(lambda tree: loss(tree.values()))(adapter)


def fit(tx, adapter, steps=8):
    @jax.jit
    def step(adapter, state):
        updates, state = tx.update(gradient(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state = tx.init(adapter)
    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter


def close(one, other, rtol=2e-5):
    """Every leaf, relative to its largest entry."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))

    jax.tree.map(check, one, other)


def stacked():
    """Three layers of ranks 3, 1 and 0, as `init_adapter` pads them, with a B that has moved."""
    base = {"layers": {"q": {"kernel": jnp.zeros((3, 12, 7))}}}
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q"], layers_to_transform=[0, 1],
        layers_pattern="layers", rank_pattern={"layers.1.q": 1}, init_lora_weights=False,
    )  # fmt: skip
    layouts = {"layers": KernelLayout(stack="layers")}
    return init_adapter(jax.random.key(3), base, config, layouts=layouts)["layers"]


# Formulas.


def test_lora_plus_multiplies_what_b_moves_by():
    adapter = {"q": layer()}
    options = {"learning_rate": 0.01, "weight_decay": 0.1}
    grads = gradient(adapter)
    plain, plus = optax.adamw(**options), lora_plus(**options, ratio=5.0)
    expected, _ = plain.update(grads, plain.init(adapter), adapter)
    updates, _ = plus.update(grads, plus.init(adapter), adapter)
    expected["q"]["lora_B"] *= 5
    close(updates, expected, rtol=1e-6)


def test_lora_plus_leaves_whatever_is_no_b_of_a_kernel():
    names = ("lora_A", "lora_scaling", "bias", "embedding_lora_A", "embedding_lora_B")
    updates = {name: jnp.ones(2) for name in (*names, "lora_B", "expert_lora_B")}
    scaled, _ = scale_lora_b(3.0).update(updates, STATELESS)
    assert {name: float(x[0]) for name, x in scaled.items()} == {
        **dict.fromkeys(names, 1.0), "lora_B": 3.0, "expert_lora_B": 3.0,
    }  # fmt: skip


def test_lora_fa_is_the_gradient_of_the_weight_projected_on_what_a_spans():
    p = layer(scaling=0.25)
    weight = jax.random.normal(jax.random.key(9), (12, 7))
    g = {"q": {"lora_B": 0.25 * p["lora_A"].T @ weight}}
    solved, _ = scale_by_lora_fa().update(g, STATELESS, {"q": p})
    nearest = np.linalg.lstsq(np.float64(p["lora_A"]), np.float64(weight))[0]
    close(0.25 * solved["q"]["lora_B"], jnp.float32(nearest))


def test_riemannian_is_its_formula():
    p, g = layer(), layer(seed=1)
    updates, _ = scale_by_riemannian(0.3).update({"q": g}, STATELESS, {"q": p})
    a, b, g_a, g_b = (np.float64(t[n]) for t in (p, g) for n in ("lora_A", "lora_B"))
    damp = 0.3 * np.eye(3)
    close(updates["q"]["lora_A"], jnp.float32(g_a @ np.linalg.inv(b @ b.T + damp)))
    close(updates["q"]["lora_B"], jnp.float32(np.linalg.inv(a.T @ a + damp) @ g_b))
    assert updates["q"]["lora_scaling"] is g["lora_scaling"]


def test_riemannian_descent_does_not_depend_on_how_the_product_is_split():
    """A·M and M⁻¹·B go the way of A and B; plain gradient descent does not."""
    p = layer()
    mix = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [1.0, 0.0, 3.0]])
    other = {**p, "lora_A": p["lora_A"] @ mix, "lora_B": jnp.linalg.solve(mix, p["lora_B"])}

    def product(tx, p):
        after = fit(tx, {"q": p})["q"]
        return after["lora_A"] @ after["lora_B"]

    scaled = freeze_base(optax.chain(scale_by_riemannian(1e-7), optax.sgd(0.02)))
    assert jnp.abs(product(scaled, p) - p["lora_A"] @ p["lora_B"]).max() > 0.1
    close(product(scaled, other), product(scaled, p), rtol=1e-4)
    plain = freeze_base(optax.sgd(1e-3))
    assert jnp.abs(product(plain, other) - product(plain, p)).max() > 0.1


@pytest.mark.parametrize("make", MAKERS)
def test_what_stands_in_the_chain_is_the_ready_one(make):
    transform = {
        lora_fa: optax.chain(scale_by_lora_fa(1e-3), optax.adam(0.02)),
        lora_plus: optax.chain(optax.adam(0.02), scale_lora_b(3.0)),
        riemannian: optax.chain(scale_by_riemannian(1e-3), optax.adam(0.02)),
    }[make]
    option = {"ratio": 3.0} if make is lora_plus else {"damping": 1e-3}
    adapter = {"q": layer()}
    own = fit(freeze_base(transform), adapter)
    ready = fit(freeze_base(make(0.02, **option)), adapter)
    if make is lora_fa:  # with A frozen the others go another way
        close(ready["q"]["lora_A"], adapter["q"]["lora_A"], rtol=0)
        one = freeze_base(transform, lambda p: {"q": {n: n == "lora_B" for n in p["q"]}})
        own = fit(one, adapter)
    close(ready, own, rtol=1e-6)


# Stacks and padding.


@pytest.mark.parametrize("make", MAKERS)
def test_a_stack_is_its_layers_and_its_padding_stays_zero(make):
    before = stacked()
    for i, rank in enumerate((3, 1)):
        before[f"layer {i}"] = {
            "lora_A": before["q"]["lora_A"][i, :, :rank],
            "lora_B": before["q"]["lora_B"][i, :rank],
            "lora_scaling": before["q"]["lora_scaling"][i],
        }
    after = fit(freeze_base(make(0.05, weight_decay=0.1)), before)
    moved = after["q"]
    np.testing.assert_array_equal(moved["lora_A"][1, :, 1:], 0)
    np.testing.assert_array_equal(moved["lora_B"][1, 1:], 0)
    for name in ("lora_A", "lora_B"):
        np.testing.assert_array_equal(moved[name][2], 0)
    for i, rank in enumerate((3, 1)):
        alone = after[f"layer {i}"]
        close(moved["lora_A"][i, :, :rank], alone["lora_A"], rtol=1e-4)
        close(moved["lora_B"][i, :rank], alone["lora_B"], rtol=1e-4)
        assert jnp.abs(alone["lora_B"] - before[f"layer {i}"]["lora_B"]).max() > 0.1


@pytest.mark.parametrize("make", MAKERS)
def test_a_fresh_adapter_learns(make):
    """B is zero, and so is the Gram matrix that A's gradient is divided by."""
    adapter = {"q": {**layer(), "lora_B": jnp.zeros((3, 7))}}
    after = fit(freeze_base(make(0.02)), adapter)["q"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    error = [
        float(jnp.abs(1.5 * p["lora_A"] @ p["lora_B"] - 0.5).mean()) for p in (adapter["q"], after)
    ]
    assert error[1] < 0.99 * error[0]


@pytest.mark.parametrize("kind", ["equal rows", "half the rank", "more rows than columns"])
@pytest.mark.parametrize("rank", [2, 32])
def test_a_gram_matrix_without_an_inverse_makes_no_nan(kind, rank):
    """What is solved is right on the space that the factor spans; that is all that A·B shows."""
    generator = np.random.default_rng(rank)
    part = {"equal rows": 1, "half the rank": rank // 2, "more rows than columns": rank}[kind]
    columns = 1 if kind == "more rows than columns" else 3 * rank
    mix = np.ones((rank, 1)) if kind == "equal rows" else generator.normal(size=(rank, part))
    factor = 100 * mix @ generator.normal(size=(part, columns))
    whole = generator.normal(size=(columns, 4))
    solved = solve_gram(jnp.float32(factor), jnp.float32(factor @ whole), 1e-8)
    expected = np.linalg.pinv(factor, rcond=1e-9) @ (factor @ whole)
    np.testing.assert_allclose(factor.T @ solved, expected, atol=2e-2 * np.abs(expected).max())


# What they leave alone, and what may stand around them.


def test_lora_fa_keeps_a_and_the_scaling_and_no_state_for_them():
    adapter = {"q": layer()}
    tx = lora_fa(0.05, weight_decay=0.1)
    state = jax.tree.leaves(tx.init(adapter))
    assert [x.shape for x in state if x.ndim] == [(3, 7)] * 2
    after = fit(tx, adapter)["q"]
    for name in ("lora_A", "lora_scaling"):
        np.testing.assert_array_equal(after[name], adapter["q"][name])
    assert jnp.abs(after["lora_B"] - adapter["q"]["lora_B"]).max() > 0.1


def test_lora_fa_trains_an_embeddings_adapter_as_adamw_does():
    one = {f"embedding_{name}": x for name, x in layer().items()}
    grads = jax.tree.map(jnp.ones_like, one)
    ours, plain = freeze_base(lora_fa(0.1)), freeze_base(optax.adam(0.1))
    updates, expected = (tx.update(grads, tx.init(one), one)[0] for tx in (ours, plain))
    close(updates, expected, rtol=1e-6)
    assert float(jnp.abs(updates["embedding_lora_A"]).min()) > 0.09


@pytest.mark.parametrize("make", MAKERS)
def test_bases_beside_the_adapter_stay_as_they_are(make):
    params = {"q": {"kernel": jnp.ones((12, 7)), **layer()}}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = freeze_base(optax.chain(optax.clip_by_global_norm(1.0), make(0.1)))
    after = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    for name in ("kernel", "lora_scaling"):
        np.testing.assert_array_equal(after["q"][name], params["q"][name])
    assert jnp.abs(after["q"]["lora_B"] - params["q"]["lora_B"]).min() > 0.05


@pytest.mark.parametrize("make", MAKERS)
def test_inside_other_transformations(make):
    adapter = {"q": layer()}
    plain = fit(freeze_base(make(0.05)), adapter, 3)
    option = "ratio" if make is lora_plus else "damping"
    injected = optax.inject_hyperparams(
        make, static_args=("b1", "b2", "eps", "weight_decay", option)
    )
    for tx in (
        freeze_base(freeze_base(make(optax.constant_schedule(0.05)))),
        optax.MultiSteps(freeze_base(make(0.05)), 1).gradient_transformation(),
        freeze_base(injected(0.05)),
    ):
        close(fit(tx, adapter, 3), plain, rtol=1e-6)


@pytest.mark.parametrize("transform", [scale_by_lora_fa(), scale_by_riemannian(), scale_lora_b(1)])
def test_half_precision_updates_keep_their_type(transform):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), {"q": layer()})
    updates, _ = transform.update(half, STATELESS, half)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_masked_leaves_are_passed_over():
    adapter = {"q": layer(), "v": layer(1)}
    masks = {"q": dict.fromkeys(adapter["q"], True), "v": dict.fromkeys(adapter["v"], False)}
    for transform in (scale_by_lora_fa(), scale_by_riemannian(), scale_lora_b(2.0)):
        tx = optax.masked(transform, masks)
        updates, _ = tx.update(adapter, tx.init(adapter), adapter)
        assert updates["v"] is not None and updates["v"]["lora_B"] is adapter["v"]["lora_B"]
        assert jnp.abs(updates["q"]["lora_B"] - adapter["q"]["lora_B"]).max() > 0.01


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora_plus(0.1, ratio=0.0), "lora_plus: ratio must be a number above 0, got 0.0"),
        (lambda: scale_lora_b(float("nan")), "lora_plus: ratio must be a number above 0, got nan"),
        (lambda: lora_fa(0.1, damping=0.0), "lora_fa: damping must be a number above 0, got 0.0"),
        (
            lambda: riemannian(0.1, damping=float("inf")),
            "riemannian: damping must be a number above 0, got inf",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("transform", "name"),
    [(scale_by_lora_fa(), "lora_fa"), (scale_by_riemannian(), "riemannian")],
)
def test_needs_the_weights_it_reads(transform, name):
    adapter = {"q": layer()}
    with pytest.raises(InputError, match=f"^{name}: needs the weights; call tx.update"):
        transform.update(adapter, STATELESS)
    hidden = optax.masked(transform, {"q": {n: n == "lora_B" for n in adapter["q"]}})
    with pytest.raises(InputError, match=f"^{name}: q/lora_B is there without q/lora_A; give"):
        hidden.update(adapter, hidden.init(adapter), adapter)
