"""Experts: a stack of matrices, each with an adapter of its own, is as many single layers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    dequantize,
    extract_adapter,
    init_adapter,
    init_with_base,
    lora_linen,
    merge_adapter,
    optim,
    quantize,
    resize_adapter,
    scale_adapter,
    trainable_mask,
    unmerge_adapter,
    with_dropout,
    without_start,
)
from lora_jax.adapters import save_adapter, weighted_adapter
from lora_jax.lora import KernelLayout, find_targets, pattern_counts, single_layers
from tests import compiled

LAYERS, EXPERTS, WIDTH, INNER = 2, 3, 4, 6
LAYOUTS = {
    "layers": KernelLayout(stack="layers"),
    "layers/experts": KernelLayout((0,), "layers", experts=True),
}
X = jax.random.normal(jax.random.key(9), (5, WIDTH))


class Experts(nn.Module):
    width: int = WIDTH
    inner: int = INNER

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(0.5)
        up = self.param("up", normal, (EXPERTS, self.width, self.inner))
        down = self.param("down", normal, (EXPERTS, self.inner, self.width))
        return jnp.einsum("tef,efd->td", jnp.tanh(jnp.einsum("td,edf->tef", x, up)), down)


class Layer(nn.Module):
    width: int = WIDTH
    inner: int = INNER

    @nn.compact
    def __call__(self, x, _):
        return x + Experts(self.width, self.inner, name="experts")(x), None


class Stack(nn.Module):
    width: int = WIDTH
    inner: int = INNER
    length: int = LAYERS

    @nn.compact
    def __call__(self, x):
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length)
        layers = nn.scan(nn.remat(Layer, prevent_cse=False), **axes)
        return layers(self.width, self.inner, name="layers")(x, None)[0]


def config(**given):
    fields: dict[str, Any] = {
        "target_parameters": ["up", "down"],
        "r": 2,
        "lora_alpha": 5,
        "init_lora_weights": False,
        **given,
    }
    return LoraConfig(**fields)


@functools.cache
def base():
    return compiled.init(Stack(), jax.random.key(0), X)


def adapted(lora, params=None):
    return init_adapter(jax.random.key(1), params or base(), lora, layouts=LAYOUTS)


def close(a, b, atol=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= atol * np.abs(b).max()


def test_the_factors_stand_beside_the_parameter():
    found = find_targets(base(), config(), layouts=LAYOUTS)
    assert [t.lead for t in found] == [(LAYERS, EXPERTS)] * 2
    own = jax.tree.map(jnp.shape, adapted(config(use_dora=True)))["layers"]["experts"]
    assert own == {
        "up_lora_A": (2, 3, 4, 2),
        "up_lora_B": (2, 3, 2, 6),
        "up_lora_scaling": (2, 3),
        "up_lora_magnitude": (2, 3, 6),
        "down_lora_A": (2, 3, 6, 2),
        "down_lora_B": (2, 3, 2, 4),
        "down_lora_scaling": (2, 3),
        "down_lora_magnitude": (2, 3, 4),
    }


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_experts_are_separate_layers(dora):
    """Each expert as two Dense layers under its own adapter: same sums, same gradients."""
    lora = config(use_dora=dora, rank_pattern={r"layers\.1\.experts\.up": 1})
    params, adapter = base(), adapted(lora)

    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(INNER, use_bias=False, name="up")(x))
            return nn.Dense(WIDTH, use_bias=False, name="down")(x)

    def single(tree, layer, expert):
        tree = jax.tree.map(lambda leaf: leaf[layer, expert], tree["layers"]["experts"])
        named = {name: {} for name in ("up", "down")}
        for name, leaf in tree.items():
            param, _, part = name.partition("_")
            named[param][part or "kernel"] = leaf
        return named

    def one_by_one(adapter):
        x = X
        for layer in range(LAYERS):
            trees = [combine(single(params, layer, e), single(adapter, layer, e))
                     for e in range(EXPERTS)]  # fmt: skip
            x = x + sum(lora_linen(Expert()).apply({"params": tree}, x) for tree in trees)
        return x

    def at_once(adapter):
        return lora_linen(Stack()).apply({"params": combine(params, adapter)}, X)

    def of_all(adapter):
        pulls = [jax.vjp(f, adapter) for f in (at_once, one_by_one)]
        return [(out, pull(jnp.cos(out))[0]) for out, pull in pulls]

    (out, ours), (expected, theirs) = jax.jit(of_all)(adapter)
    close(out, expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)


def test_merged_and_taken_out_again():
    params, adapter = base(), adapted(config())
    merged = merge_adapter(params, adapter, layouts=LAYOUTS, safe=True)
    before = compiled.apply(lora_linen(Stack()), combine(params, adapter), X)
    close(compiled.apply(Stack(), merged, X), before)
    again = unmerge_adapter(merged, adapter, layouts=LAYOUTS)
    jax.tree.map(lambda a, b: close(a, b), again, params)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_on_four_bits(dora):
    params = jax.tree.map(lambda w: quantize(w, QuantConfig(block_size=32), stacked=2), base())
    adapter = adapted(config(use_dora=dora), params)
    dense = jax.tree.map(dequantize, params, is_leaf=lambda x: hasattr(x, "codes"))
    out = compiled.apply(lora_linen(Stack()), combine(params, adapter), X)
    close(out, compiled.apply(lora_linen(Stack()), combine(dense, adapter), X))
    merged = merge_adapter(params, adapter, layouts=LAYOUTS)
    close(compiled.apply(Stack(), merged, X), out)


def test_only_factors_are_trained():
    params, adapter = base(), adapted(config())
    mask = trainable_mask(combine(params, adapter))["layers"]["experts"]
    assert {name for name, value in mask.items() if value} == {
        f"{w}_lora_{x}" for w in ("up", "down") for x in "AB"
    }

    def loss(adapter):
        return jnp.sum(compiled.apply(lora_linen(Stack()), combine(params, adapter), X) ** 2)

    for tx in (
        optim.freeze_base(optax.sgd(0.1)),
        optim.freeze_base(optim.lora_plus(1e-3, ratio=4)),
        optim.freeze_base(optim.riemannian(1e-3)),
    ):

        @jax.jit
        def stepped(adapter, tx=tx):
            updates, _ = tx.update(jax.grad(loss)(adapter), tx.init(adapter), adapter)
            return optax.apply_updates(adapter, updates)

        new = jax.tree.map(np.asarray, stepped(adapter))["layers"]["experts"]
        assert all(np.isfinite(leaf).all() for leaf in new.values())
        assert (new["up_lora_scaling"] == 2.5).all()
        assert (new["up_lora_A"] != adapter["layers"]["experts"]["up_lora_A"]).any()


def temporary_bytes(length, width=128):
    shape = jax.ShapeDtypeStruct((length, EXPERTS, width, width), jnp.float32)
    params = {"layers": {"experts": {"up": shape, "down": shape}}}
    adapter = jax.eval_shape(lambda p: adapted(config(), p), params)

    def loss(adapter, params, x):
        out = lora_linen(Stack(width, width, length)).apply({"params": combine(params, adapter)}, x)
        return jnp.sum(out**2)

    x = jax.ShapeDtypeStruct((5, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(adapter, params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_one_layer_of_experts_is_dense_at_a_time():
    """Compiled, not run: more layers cost their inputs and factors, not W0 + scaling·A·B."""
    few, many = temporary_bytes(4), temporary_bytes(16)
    dense = EXPERTS * 128 * 128 * 4
    assert (many - few) / 12 < 0.15 * dense


class Vmapped(nn.Module):
    """Experts made by vmap of a whole module, by themselves or in scanned layers."""

    @nn.compact
    def __call__(self, x, _=None):
        experts = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=None, axis_size=EXPERTS,
        )  # fmt: skip
        return experts(WIDTH, name="experts")(x).sum(0), None


def test_experts_by_vmap_are_a_stack():
    params = compiled.init(Vmapped(), jax.random.key(0), X)
    layouts = lora_linen(Vmapped()).layouts(params, X)
    assert layouts["experts/kernel"] == KernelLayout((0,), stack="experts")
    lora = LoraConfig(r=2, target_modules=r"experts\.[02]", init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), params, lora, layouts=layouts)
    assert (adapter["experts"]["lora_scaling"] == jnp.array([4.0, 0.0, 4.0])).all()
    out, _ = compiled.apply(lora_linen(Vmapped()), combine(params, adapter), X)
    merged = merge_adapter(params, adapter, layouts=layouts)
    close(out, compiled.apply(Vmapped(), merged, X)[0])


@pytest.mark.parametrize("field", ["target_modules", "target_parameters"])
def test_experts_by_vmap_in_scanned_layers_need_a_rule(field, tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return nn.scan(Vmapped, **axes)(name="layers")(x, None)[0]

    params = compiled.init(Model(), jax.random.key(0), X)
    with pytest.raises(InputError, match=r"KernelLayout\(experts=True\)"):
        lora_linen(Model()).layouts(params, X)
    rules = {"layers/experts": KernelLayout(experts=True)}
    layouts = lora_linen(Model(), layouts=rules).layouts(params, X)
    assert layouts["layers/experts/kernel"] == KernelLayout((0,), "layers", experts=True)
    name = "experts" if field == "target_modules" else "experts.kernel"
    chosen: dict[str, Any] = {field: [name]}
    lora = LoraConfig(r=2, init_lora_weights=False, use_dora=True, **chosen)
    adapter = init_adapter(jax.random.key(1), params, lora, layouts=layouts)
    assert adapter["layers"]["experts"]["lora_B"].shape == (LAYERS, EXPERTS, 2, WIDTH)
    out = compiled.apply(lora_linen(Model()), combine(params, adapter), X)
    merged = merge_adapter(params, adapter, layouts=layouts)
    close(out, compiled.apply(Model(), merged, X))
    if field == "target_parameters":
        save_adapter(tmp_path, adapter, lora, layouts=layouts)
    else:
        with pytest.raises(InputError, match="only of target_parameters"):
            save_adapter(tmp_path, adapter, lora, layouts=layouts)


def delta(adapter):
    zero = jax.tree.map(np.zeros_like, base())
    merged = merge_adapter(zero, adapter, layouts=LAYOUTS)["layers"]["experts"]
    return jax.tree.map(np.asarray, merged)


def test_operations_take_each_expert_for_a_layer():
    lora = config(rank_pattern={r"layers\.0\.experts\.up": 1})
    adapter = adapted(lora)
    views = single_layers(adapter, lora, LAYOUTS)["layers/experts/up"]
    assert [(x.name, x.rank) for x in views][2:4] == [
        ("layers/0/experts/up/2", 1),
        ("layers/1/experts/up/0", 2),
    ]
    own = delta(adapter)
    jax.tree.map(lambda a, b: close(a, -2 * b), delta(scale_adapter(adapter, -2.0)), own)
    wide, wide_config = resize_adapter(adapter, lora, 4)
    assert wide_config.target_parameters == ["up", "down"]
    jax.tree.map(close, delta(wide), own)
    for kind in ("cat", "svd"):
        both = [(adapter, lora), (scale_adapter(adapter, 3.0), config(
            target_parameters=["experts.up", "down"], rank_pattern=lora.rank_pattern,
        ))]  # fmt: skip
        mixed, mixed_config = weighted_adapter(both, [1.0, -1.0], kind, layouts=LAYOUTS)
        assert mixed_config.target_parameters == ["up", "down", "experts.up"]
        jax.tree.map(lambda a, b: close(a, -2 * b), delta(mixed), own)
    params = base()
    merged = merge_adapter(params, adapter, layouts=LAYOUTS)
    found = extract_adapter(params, merged, lora, layouts=LAYOUTS)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), delta(found), own)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_from_the_weights_of_each_expert(start):
    lora, params = config(init_lora_weights=start), base()
    quant = QuantConfig(block_size=32) if start == "loftq" else None
    moved, adapter = init_with_base(jax.random.key(0), params, lora, quant, layouts=LAYOUTS)
    whole = merge_adapter(moved, adapter, layouts=LAYOUTS)
    if start == "loftq":
        q = moved["layers"]["experts"]["up"]
        bare = jnp.linalg.norm(dequantize(q) - params["layers"]["experts"]["up"])
        left = jnp.linalg.norm(whole["layers"]["experts"]["up"] - params["layers"]["experts"]["up"])
        assert left < 0.9 * bare
        return
    jax.tree.map(close, whole, params)
    left = moved["layers"]["experts"]["up"]
    if start == "pissa":
        assert (jnp.linalg.matrix_rank(left, rtol=1e-4) == min(WIDTH, INNER) - 2).all()
    plain, _ = without_start(adapter, adapter, lora)
    assert jnp.abs(delta(plain)["up"]).max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["experts.upp"]}, r"'experts.upp' matches nothing \(did you mean"
         r" 'experts.up'\?\)"),
        ({"target_modules": ["q"]}, "target_modules 'q' matches nothing"),
        ({"rank_pattern": {"experts": 3}}, "rank_pattern 'experts' matches nothing"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        find_targets(base(), config(**fields), layouts=LAYOUTS)


def test_names_are_counted_layer_by_layer():
    counts = pattern_counts(base(), config(target_parameters=["experts.up"]), layouts=LAYOUTS)
    assert counts == {("target_parameters", "experts.up"): LAYERS}


def test_a_stack_of_experts_is_not_guessed():
    params = {"experts": {"up": jnp.zeros((3, 4, 6))}}
    with pytest.raises(InputError, match="experts=True"):
        find_targets(params, config(target_parameters=["up"]))
    with pytest.raises(InputError, match="takes matrices and stacks of experts"):
        rule = {"experts": KernelLayout((0,))}
        find_targets(params, config(target_parameters=["up"]), layouts=rule)


def test_dropout_has_no_input_to_drop():
    with pytest.raises(InputError, match="lora_dropout=0.1 does not go with target_parameters"):
        config(lora_dropout=0.1)
    adapter = with_dropout(jax.random.key(0), adapted(config()), 0.1)
    with pytest.raises(InputError, match="needs a layer whose input is known"):
        compiled.apply(lora_linen(Stack()), combine(base(), adapter), X)


def test_what_the_file_format_has_no_place_for(tmp_path):
    params = {"up": jnp.zeros((3, 4, 6)), "q": {"kernel": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}}
    layouts = {"up": KernelLayout((0,), experts=True)}
    lora = config(target_parameters=["up"])
    adapter = init_adapter(jax.random.key(0), params, lora, layouts=layouts)
    with pytest.raises(InputError, match="a layer without a name"):
        save_adapter(tmp_path / "a", adapter, lora, layouts=layouts)
    lora = config(target_parameters=["q.w"], target_modules=["q"])
    adapter = init_adapter(jax.random.key(0), params, lora, layouts=layouts)
    with pytest.raises(InputError, match="cannot adapt both a module and a parameter"):
        save_adapter(tmp_path / "a", adapter, lora, layouts=layouts)
    assert not (tmp_path / "a").exists()


def test_single_layers_are_numpy_slices():
    lora = config()
    adapter = adapted(lora)
    views = single_layers(adapter, lora, LAYOUTS)["layers/experts/down"]
    whole = np.asarray(adapter["layers"]["experts"]["down_lora_A"])
    for x, own in zip(views, whole.reshape(-1, INNER, 2), strict=True):
        assert np.array_equal(x.lora_A, own)
