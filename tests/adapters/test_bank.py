"""A bank of adapters: each row through its own, slots swapped without compiling anew."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    KernelLayout,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    with_dropout,
)
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.adapters import AdapterBank
from lora_jax.lora import choose_rows
from lora_jax.models import CausalLM, ModelConfig, generate, quantize_params
from tests import compiled

SHAPE = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
MODULES = ["q_proj", "o_proj", "down_proj", "embed_tokens"]
MODEL = lora_linen(CausalLM(SHAPE))
IDS = jax.random.randint(jax.random.key(3), (4, 6), 0, 40)


@pytest.fixture(scope="module")
def base():
    return compiled.init(CausalLM(SHAPE), jax.random.key(0), IDS)


def config(**fields):
    plain = {"r": 4, "lora_alpha": 6, "target_modules": MODULES, "init_lora_weights": False}
    return LoraConfig(**{**plain, **fields})


def adapter_of(base, i: int, **fields):
    made = init_adapter(jax.random.key(i), base, config(**fields), layouts=LAYOUTS)
    # Magnitudes away from the norms they begin with.
    return dict(map_with_path(lambda p, x: x * (1.1 + 0.1 * i) if "magnitude" in p else x, made))


@jax.jit
def logits(base, overlay, ids=IDS):
    return MODEL.apply({"params": combine(base, overlay)}, ids)


def close(found, expected, tolerance=1e-5):
    return float(np.abs(found - expected).max()) < tolerance * float(np.abs(expected).max())


@pytest.mark.parametrize(
    ("dora", "quant"),
    [
        pytest.param(False, None, id="lora"),
        pytest.param(True, QuantConfig(block_size=32), id="dora over nf4"),
    ],
)
def test_each_row_is_as_if_it_were_alone(base, dora, quant):
    own = base if quant is None else quantize_params(base, quant)
    kinds = [{"r": 4}, {"r": 2, "use_rslora": True}, {"r": 4, "layers_to_transform": [1]}]
    if dora:
        kinds = [{**kind, "use_dora": i != 1} for i, kind in enumerate(kinds)]
    bank = AdapterBank.empty(own, config(use_dora=dora), slots=4, layouts=LAYOUTS)
    adapters = [adapter_of(own, i, **kind) for i, kind in enumerate(kinds)]
    for name, adapter in zip("abc", adapters, strict=True):
        bank = bank.swap(name, adapter)
    found = logits(own, bank.overlay(["c", None, "a", "b"]))
    # A batch of one kind: rows do not see each other.
    plain = logits(own, {})
    alone = [plain if i is None else logits(own, adapters[i]) for i in (2, None, 0, 1)]
    assert close(found, jnp.stack([whole[row] for row, whole in enumerate(alone)]))
    assert not close(alone[0], plain, 1e-2)


def test_swapping_compiles_nothing_anew(base):
    bank = AdapterBank.empty(base, config(r=8), slots=3, layouts=LAYOUTS)
    traced = []

    @jax.jit
    def step(slots, rows):
        traced.append(1)
        return logits(base, combine(slots, choose_rows(slots, rows)))

    seen = []
    for i, rank in enumerate((1, 4, 8, 2)):
        bank = bank.swap("new", adapter_of(base, i, r=rank))
        seen.append(step(bank.slots, bank.rows([None, "new", "new", None])))
        assert close(seen[-1][1], logits(base, adapter_of(base, i, r=rank))[1])
    bank = bank.drop("new").swap("other", adapter_of(base, 7, r=5), slot=2)
    step(bank.slots, bank.rows(["other"] * 4))
    assert len(traced) == 1 and step._cache_size() == 1
    assert close(seen[0][0], logits(base, {})[0]) and close(seen[3][0], seen[0][0], 1e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_those_of_each_adapter_alone(base, dora):
    adapters = [adapter_of(base, i, r=r, use_dora=dora) for i, r in ((0, 4), (1, 2))]
    bank = AdapterBank.empty(base, config(use_dora=dora), slots=3, layouts=LAYOUTS)
    bank = bank.swap("a", adapters[0]).swap("b", adapters[1])
    rows = bank.rows(["b", "a", None, "b"])
    weights = jax.random.normal(jax.random.key(8), (*IDS.shape, SHAPE.vocab_size))

    def loss(slots):
        return jnp.sum(weights * logits(base, combine(slots, choose_rows(slots, rows))))

    def alone(adapter, mine):
        return jnp.sum((weights * logits(base, adapter))[mine])

    found = AdapterBank(jax.grad(loss)(bank.slots), bank.names)
    for i, name in enumerate("ab"):
        mine = np.flatnonzero(np.asarray(rows) == i)
        expected = dict(leaves_with_path(jax.grad(alone)(adapters[i], mine)))
        for path, g in leaves_with_path(found.take(name, adapters[i])):
            if "scaling" not in path and "untied" not in path:
                largest = float(np.abs(expected[path]).max())
                assert largest > 0 and np.abs(g - expected[path]).max() < 1e-4 * largest, path
    for path, g in leaves_with_path(found.slots):  # the slot that nobody uses
        if "untied" not in path:
            axis = g.ndim - (2 if path.endswith(("A", "B")) else 1 if "magnitude" in path else 0)
            assert not np.any(np.take(np.asarray(g), 2, axis=axis - 1))


def test_dropout_is_drawn_for_every_row(base):
    bank = AdapterBank.empty(base, config(target_modules=["down_proj"]), slots=1, layouts=LAYOUTS)
    bank = bank.swap("a", adapter_of(base, 0, target_modules=["down_proj"]))
    same = jnp.broadcast_to(IDS[0], IDS.shape)

    def run(key, names):
        slots = with_dropout(key, bank.slots, 0.5)
        return logits(base, combine(slots, choose_rows(bank.slots, bank.rows(names))), same)

    found = run(jax.random.key(0), ["a", "a", None, "a"])
    assert not close(found[0], found[1], 1e-3) and not close(found[0], found[3], 1e-3)
    assert close(found[2], logits(base, {}, same)[2])
    assert close(found, run(jax.random.key(0), ["a", "a", None, "a"]), 1e-7)


def test_generating_mixes_adapters(base):
    bank = AdapterBank.empty(base, config(), slots=2, layouts=LAYOUTS)
    adapters = [adapter_of(base, i) for i in range(2)]
    bank = bank.swap("a", adapters[0]).swap("b", adapters[1])
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    mixed = generate(
        MODEL, combine(base, bank.overlay(["b", "a", None])), prompts, max_new_tokens=6
    )
    for row, own in enumerate((adapters[1], adapters[0], {})):
        (alone,) = generate(MODEL, combine(base, own), prompts[row : row + 1], max_new_tokens=6)
        assert mixed[row] == alone


class Net(nn.Module):
    """A kernel of three axes, an Einsum, and a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.Einsum((2, 3, 5), "bthd,hde->bte", name="join")(x)
        return nn.Dense(4, name="head")(x)


def test_layers_of_more_axes(base):
    model, x = Net(), jax.random.normal(jax.random.key(0), (3, 4, 6))
    params = compiled.init(model, jax.random.key(1), x)
    adapted = lora_linen(model)
    layouts = adapted.layouts(params, x)
    own = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    bank = AdapterBank.empty(params, own, slots=2, layouts=layouts)
    adapter = init_adapter(jax.random.key(2), params, own, layouts=layouts)
    bank = bank.swap("a", adapter)
    found = compiled.apply(adapted, combine(params, bank.overlay([None, "a", "a"])), x)
    assert close(found[0], compiled.apply(model, params, x)[0])
    assert close(found[1:], compiled.apply(adapted, combine(params, adapter), x)[1:])


def test_each_row_has_its_own_bias(base):
    kinds = [{"lora_bias": True}, {}]
    modules = ["q_proj", "down_proj"]
    adapters = [adapter_of(base, i, target_modules=modules, **kind) for i, kind in enumerate(kinds)]
    own = config(target_modules=modules, lora_bias=True)
    bank = AdapterBank.empty(base, own, slots=2, layouts=LAYOUTS)
    bank = bank.swap("a", adapters[0]).swap("b", adapters[1])
    found = logits(base, bank.overlay(["a", "b", None, "a"]))
    alone = [logits(base, overlay) for overlay in (*adapters, {})]
    expected = jnp.stack([alone[0][0], alone[1][1], alone[2][2], alone[0][3]])
    assert close(found, expected) and not close(found[0], alone[2][0], 1e-2)


@pytest.mark.parametrize("names", [["b", None, "a", "b"], ["b", "b", "a", "b"], [None] * 4])
@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_single_tokens_are_as_those_of_longer_rows(field, names):
    """They go slot by slot, few or many through one: it shows in nothing, nor in gradients."""
    model, x = nn.Dense(5, name="head"), jax.random.normal(jax.random.key(0), (4, 1, 6))
    params = compiled.init(model, jax.random.key(1), x)
    own = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **{field: True})
    bank = AdapterBank.empty(params, own, slots=3)
    for i, name in enumerate("abc"):
        adapter = init_adapter(jax.random.key(i), params, own)
        # What overflows in a slot is not seen by rows of others.
        factor = 1e38 if name == "c" and not own.use_dora else 1.0
        made = map_with_path(lambda p, x, f=factor: f * x if p.endswith("A") else x, adapter)
        bank = bank.swap(name, dict(made))
    rows = bank.rows(names)

    @jax.jit
    def loss(slots, rows, x):
        tree = combine(params, combine(slots, choose_rows(slots, rows)))
        y = lora_linen(model).apply({"params": tree}, x)[:, -1]
        return jnp.sum(y * jnp.arange(5)), y

    grad = jax.grad(loss, has_aux=True)
    single, double = (grad(bank.slots, rows, jnp.repeat(x, n, axis=1)) for n in (1, 8))
    for found, expected in zip(*map(jax.tree.leaves, (single, double)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_comes_out_as_it_went_in(base):
    adapter = adapter_of(base, 1, r=2, use_dora=True, target_modules=["q_proj"])
    bank = AdapterBank.empty(base, config(use_dora=True), slots=2, layouts=LAYOUTS)
    taken = bank.swap("x", adapter_of(base, 0)).swap("a", adapter).take("a", adapter)
    leaves = dict(leaves_with_path(taken))
    assert all(np.array_equal(leaves[path], x) for path, x in leaves_with_path(adapter))


def test_slots_are_named_taken_and_freed(base):
    own = config(target_modules=["q_proj"])
    adapter = adapter_of(base, 0, target_modules=["q_proj"])
    bank = AdapterBank.empty(base, own, slots=2, layouts=LAYOUTS)
    bank = bank.swap("a", adapter).swap("b", adapter)
    assert bank.names == ("a", "b") and bank.swap("a", adapter).names == ("a", "b")
    assert bank.drop("a").swap("c", adapter).names == ("c", "b")
    assert bank.swap("c", adapter, slot=1).names == ("a", "c")
    moved = bank.swap("a", adapter, slot=1)
    assert moved.names == (None, "a")
    assert not any(np.any(x[:, 0]) for _, x in leaves_with_path(moved.slots))
    assert not any(np.any(x[:, 0]) for _, x in leaves_with_path(bank.drop("a").slots))
    for use, said in (
        (lambda: bank.swap("c", adapter), "all 2 slots are taken by a, b"),
        (lambda: bank.swap("c", adapter, slot=2), "slot must be from 0 to 1, got 2"),
        (lambda: bank.rows(["a", "bb"]), r"no adapter 'bb' \(did you mean 'b'"),
        (lambda: bank.drop("z"), "it holds a, b"),
    ):
        with pytest.raises(InputError, match=said):
            use()


def test_what_does_not_fit_is_refused_with_the_first_reasons(base):
    bank = AdapterBank.empty(base, config(target_modules=["q_proj"]), slots=1, layouts=LAYOUTS)
    with pytest.raises(InputError, match=r"lora_A: has rank 5, and there is room for 4"):
        bank.swap("a", adapter_of(base, 0, r=5, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"lora_magnitude has no room"):
        bank.swap("a", adapter_of(base, 0, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"(; .*){3}and 3 more"):
        bank.swap("a", adapter_of(base, 0, target_modules=["o_proj", "down_proj"]))
    other = init_adapter(
        jax.random.key(0),
        {"model": {"layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((2, 32, 16))}}}}},
        config(target_modules=["q_proj"]),
        layouts=LAYOUTS,
    )
    with pytest.raises(InputError, match=r"has shape \(2, 4, 16\) where there is \(2, 4, 32\)"):
        bank.swap("a", other)
    for field in ({"modules_to_save": ["norm"]}, {"trainable_token_indices": [1]}):
        with pytest.raises(InputError, match=f"AdapterBank: {next(iter(field))}"):
            AdapterBank.empty(base, config(**field), layouts=LAYOUTS)
    with pytest.raises(InputError, match="AdapterBank: bias='all'"):
        AdapterBank.empty(base, config(bias="all"), layouts=LAYOUTS)
    with pytest.raises(InputError, match="slots must be at least 1"):
        AdapterBank.empty(base, config(), slots=0, layouts=LAYOUTS)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.normal(), (6, 5))


def test_what_no_row_can_have_is_refused_where_it_is_used(base):
    bank = AdapterBank.empty(base, config(target_modules=["q_proj"]), slots=1, layouts=LAYOUTS)
    bank = bank.swap("a", adapter_of(base, 0, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"each of 3 rows, but its input has shape \(4, 6, 32\)"):
        logits(base, bank.overlay(["a"] * 3))
    x = jnp.ones((2, 6))
    params = compiled.init(Raw(), jax.random.key(0), x)
    raw = LoraConfig(r=2, target_modules=["w"])
    bank = AdapterBank.empty(params, raw, slots=1)
    with pytest.raises(InputError, match="reads it as a whole"):
        compiled.apply(lora_linen(Raw()), combine(params, bank.overlay([None, None])), x)
