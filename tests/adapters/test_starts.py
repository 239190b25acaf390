"""Starts that look at data: what they watch, what they keep equal, and what they refuse."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    init_with_base,
    lora_linen,
    merge_adapter,
    quantize,
)
from lora_jax.adapters import init_corda, init_eva, init_lora_ga, load_adapter, save_adapter
from lora_jax.adapters._watch import input_moments, mean_gradients
from lora_jax.lora import KernelLayout, find_targets
from lora_jax.models import CausalLM, ModelConfig
from tests import compiled

KEY = jax.random.key(0)
SHAPE = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
IDS = jax.random.randint(KEY, (2, 3, 10), 0, 40)
SEGMENTS = jnp.ones((3, 10), jnp.int32).at[2, 6:].set(0)
BATCHES = [{"input_ids": ids, "attention_mask": SEGMENTS} for ids in IDS]
MODEL = CausalLM(SHAPE, remat="nothing")
BASE = compiled.init(MODEL, KEY, IDS[0])
CONFIG = LoraConfig(
    r=3, lora_alpha=5, target_modules="all-linear", rank_pattern={r"layers\.1\..*q_proj": 2}
)


def forward(params, batch):
    return lora_linen(MODEL).apply(
        {"params": params}, batch["input_ids"], segment_ids=batch["attention_mask"]
    )


def loss(params, batch):
    return jnp.mean(forward(params, batch) ** 2)


def close(got, want, error=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=error * np.abs(b).max())


class Heads(nn.Module):
    """Layers of several axes, one called by keyword, and one after a flag."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, 3), name="query")(x)
        k = nn.Einsum((6, 2, 3), "btd,dnh->btnh", use_bias=False, name="key")(inputs=x)
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(q * jnp.tanh(k))


def moments_of(model, params, x, mask=None, **options):
    linen = lora_linen(model)
    config = LoraConfig(r=1, target_modules="all-linear")
    targets = find_targets(params, config, layouts=linen.layouts(params, x))

    def run(params, batch):
        return linen.apply({"params": params}, batch)

    sums = input_moments(run, params, targets, [x], lambda _: mask, where="here", **options)
    return {path: m[0] for path, m in next(sums).items()}


def test_moments_are_those_of_the_inputs():
    x = jax.random.normal(KEY, (4, 5, 6))
    params = compiled.init(Heads(), KEY, x)
    mask = jnp.arange(20).reshape(4, 5) % 3 != 0
    found = moments_of(Heads(), params, x, mask)
    assert list(found) == ["query/kernel", "key/kernel", "out/kernel"]
    q = jnp.einsum("btd,dnh->btnh", x, params["query"]["kernel"]) + params["query"]["bias"]
    k = jnp.einsum("btd,dnh->btnh", x, params["key"]["kernel"])
    inputs = {"query/kernel": x, "key/kernel": x, "out/kernel": (q * jnp.tanh(k)).reshape(4, 5, 6)}
    for path, rows in inputs.items():
        chosen = np.asarray(rows)[np.asarray(mask)]
        with_one = np.pad(chosen, ((0, 0), (0, 1)), constant_values=1.0)
        close(found[path], with_one.T @ with_one)
    scaled = moments_of(Heads(), params, x, mask, scaled=True)
    for path, rows in inputs.items():
        chosen = np.asarray(rows)[np.asarray(mask)]
        close(scaled[path][:-1, :-1], chosen.T @ chosen / chosen.max() ** 2)
        assert scaled[path][-1, -1] == 1 and not scaled[path][-1, :-1].any()


def test_a_scanned_stack_is_watched_layer_by_layer():
    """In a scanned, rematerialized body, dense and in four bits, as layer by layer by hand."""
    targets = find_targets(BASE, CONFIG, layouts=LAYOUTS)
    (dense,) = input_moments(forward, BASE, targets, BATCHES[:1], lambda b: None, where="here")
    # Two projections of one input have the same moments, to the bit.
    layer = "model/layers/self_attn/{}/kernel".format
    assert np.array_equal(dense[layer("q_proj")], dense[layer("k_proj")])
    # The first layer sees what is embedded, normed.
    x = BASE["model"]["embed_tokens"]["embedding"][IDS[0].reshape(-1)]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + SHAPE.rms_norm_eps)
    x = x * BASE["model"]["layers"]["input_layernorm"]["weight"][0]
    close(dense[layer("q_proj")][0][:-1, :-1], x.T @ x)
    assert dense[layer("q_proj")].shape == (3, 17, 17)


def test_mean_gradients_are_those_of_finite_differences():
    targets = find_targets(BASE, CONFIG, layouts=LAYOUTS)
    path = "model/layers/mlp/down_proj/kernel"
    got = mean_gradients(loss, BASE, targets, BATCHES, "here")[path]
    way = jax.random.normal(KEY, got.shape)
    kernel = BASE["model"]["layers"]["mlp"]["down_proj"]["kernel"]

    def at(step):
        moved = {"model": {"layers": {"mlp": {"down_proj": {"kernel": kernel + step * way}}}}}
        return float(np.mean([loss(combine(BASE, moved), batch) for batch in BATCHES]))

    slope = (at(3e-3) - at(-3e-3)) / 6e-3
    assert float(jnp.sum(got * way)) == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize(
    ("start", "run", "fields"),
    [
        (init_corda, forward, {"init_lora_weights": "corda", "use_rslora": True}),
        (
            init_corda,
            forward,
            {
                "init_lora_weights": "corda",
                "corda_config": {"corda_method": "kpm"},
                "use_dora": True,
            },
        ),
        (init_lora_ga, loss, {"init_lora_weights": "lora_ga"}),
        (
            init_lora_ga,
            loss,
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "random"}},
        ),
    ],
    ids=["ipm", "kpm dora", "lora_ga", "random"],
)
def test_base_and_adapter_are_the_weight_together(start, run, fields):
    config = dataclasses.replace(CONFIG, **fields)
    before = jax.tree.map(jnp.copy, BASE)
    options = {"key": KEY} if start is init_lora_ga else {}
    moved, adapter = start(run, BASE, config, BATCHES, layouts=LAYOUTS, **options)
    close(merge_adapter(moved, adapter, layouts=LAYOUTS), BASE)
    close(forward(combine(moved, adapter), BATCHES[0]), forward(BASE, BATCHES[0]))
    q, theirs = moved["model"]["layers"]["self_attn"]["q_proj"], adapter["model"]["layers"]
    assert not np.allclose(q["kernel"], BASE["model"]["layers"]["self_attn"]["q_proj"]["kernel"])
    a = np.asarray(theirs["self_attn"]["q_proj"]["lora_A"])
    assert a.shape == (3, 16, 3) and not a[1, :, 2:].any() and a[:, :, :2].any(axis=1).all()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(BASE), strict=True):
        np.testing.assert_array_equal(old, new)


def test_eva_deals_out_the_same_sum_of_ranks(tmp_path):
    config = dataclasses.replace(
        CONFIG, init_lora_weights="eva", use_dora=True, layers_to_transform=[0, 2]
    )
    config = dataclasses.replace(config, rank_pattern={})
    base, adapter, given = init_eva(forward, BASE, config, BATCHES, layouts=LAYOUTS)
    assert base is BASE
    targets = find_targets(base, given, layouts=LAYOUTS)
    ranks = {n: r for t in targets for n, r in zip(t.names, t.ranks, strict=True) if r}
    assert sum(ranks.values()) == 2 * 7 * 3 and max(ranks.values()) <= 6
    assert len(set(ranks.values())) > 1 and not any("/1/" in name for name in ranks)
    for target in targets:
        for name, rank, scaling in zip(target.names, target.ranks, target.scalings, strict=True):
            assert scaling == (pytest.approx(5 / 3) if rank else 0), name
    for t in targets:
        node = adapter
        for part in t.path.split("/")[:-1]:
            node = node[part]
        a = np.asarray(node["lora_A"])
        for i, rank in enumerate(t.ranks):
            np.testing.assert_allclose(
                a[i].T @ a[i], np.diag(np.arange(a.shape[2]) < rank), atol=1e-5
            )
        assert not node["lora_B"].any()
    close(forward(combine(base, adapter), BATCHES[0]), forward(BASE, BATCHES[0]))
    save_adapter(tmp_path / "adapter", adapter, given, layouts=LAYOUTS)
    loaded, read = load_adapter(tmp_path / "adapter", BASE, layouts=LAYOUTS)
    assert read.eva_config == given.eva_config
    close(forward(combine(BASE, loaded), BATCHES[0]), forward(BASE, BATCHES[0]))


def test_eva_drops_layers_of_a_named_list():
    """Whose config then names the modules that are left, and no layers."""
    fields = {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers", "r": 1}
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights="eva", eva_config={"rho": 3.0}, **fields
    )
    _, adapter, given = init_eva(forward, BASE, config, BATCHES, layouts=LAYOUTS)
    targets = find_targets(BASE, given, layouts=LAYOUTS)
    ranks = [r for t in targets for r in t.ranks]
    assert sum(ranks) == 3 * 7 and ranks.count(0) and given.layers_pattern is None
    close(forward(combine(BASE, adapter), BATCHES[0]), forward(BASE, BATCHES[0]))


def test_lora_ga_starts_each_expert_by_its_own_gradient():
    """As it starts a matrix that is alone."""
    x, up = jax.random.normal(KEY, (2, 20, 6)), jax.random.normal(KEY, (2, 6, 8))
    fields = {"r": 2, "init_lora_weights": "lora_ga"}
    config = LoraConfig(target_parameters=["experts.up"], **fields)

    def run(params, batch):
        return jnp.mean(jnp.sin(jnp.einsum("etd,edh->eth", batch, params["experts"]["up"])) ** 2)

    layouts = {"experts/up": KernelLayout((0,), experts=True)}
    moved, adapter = init_lora_ga(run, {"experts": {"up": up}}, config, [x], layouts=layouts)
    merged = merge_adapter(moved, adapter, layouts=layouts)
    close(merged["experts"]["up"], up)
    for i in range(2):

        def alone(params, batch):
            return jnp.mean(jnp.sin(batch @ params["up"]["kernel"]) ** 2) / 2

        config = LoraConfig(target_modules=["up"], **fields)
        base, one = init_lora_ga(alone, {"up": {"kernel": up[i]}}, config, [x[i]])
        close(moved["experts"]["up"][i], base["up"]["kernel"])
        close(adapter["experts"]["up_lora_A"][i], one["up"]["lora_A"])
        close(adapter["experts"]["up_lora_B"][i], one["up"]["lora_B"])


def test_eva_watches_a_quantized_base():
    """The second layer's inputs are those that four bits give."""
    model, x = nn.Sequential([nn.Dense(16), nn.Dense(8)]), jax.random.normal(KEY, (20, 64))
    params = model.init(KEY, x)["params"]
    kernel = quantize(params["layers_0"]["kernel"], QuantConfig())
    four = combine(params, {"layers_0": {"kernel": kernel}})
    dense = combine(params, {"layers_0": {"kernel": kernel.unbox()}})
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva")

    def run(params, batch):
        return lora_linen(model).apply({"params": params}, batch)

    (_, ours, given), (_, theirs, same), (_, others, _) = (
        init_eva(run, base, config, [x]) for base in (four, dense, params)
    )
    assert given == same
    close(ours, theirs)
    a, b = ours["layers_1"]["lora_A"], others["layers_1"]["lora_A"]
    assert a.shape != b.shape or not np.allclose(a, b, atol=1e-3)


def test_eva_stops_where_nothing_turns_any_more():
    taken = []

    def batches():
        for i in range(5):
            taken.append(i)
            yield BATCHES[0]

    init = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    init_eva(forward, BASE, init, batches(), layouts=LAYOUTS)
    assert taken == [0, 1]
    taken.clear()
    whole = dataclasses.replace(init, eva_config={"tau": 1.0})
    init_eva(forward, BASE, whole, batches(), layouts=LAYOUTS)
    assert taken == [0, 1, 2, 3, 4]


MASKED = [{**b, "attention_mask": 0 * SEGMENTS} for b in BATCHES]
BROKEN = combine(
    BASE, {"model": {"norm": {"weight": jnp.full(16, jnp.nan)}, "embed_tokens": {
        "embedding": jnp.full((40, 16), jnp.inf)}}}
)  # fmt: skip


@pytest.mark.parametrize(
    ("start", "base", "batches", "fields", "message"),
    [
        (init_eva, BASE, [], {}, "init_eva: no batch was given"),
        (init_corda, BASE, [], {}, "init_corda: no batch was given"),
        (init_lora_ga, BASE, [], {}, "init_lora_ga: no batch was given"),
        (init_eva, BASE, MASKED, {}, "init_eva: the batches hold no token that counts"),
        (init_eva, BROKEN, BATCHES, {}, "init_eva: batch 0: an input of .* is not finite"),
        (init_lora_ga, BROKEN, BATCHES, {}, "init_lora_ga: batch 0: the loss is not finite"),
        (init_eva, BASE, [{k: v[:1, :5] for k, v in BATCHES[0].items()}], {}, "the 5 tokens that"),
        (init_eva, BASE, BATCHES, {"r": 17}, "rank 17 exceeds the 16 numbers of an input"),
        (init_corda, BASE, BATCHES, {"r": 17}, "rank 17 exceeds the smaller side"),
        (init_lora_ga, BASE, BATCHES, {"r": 9}, "twice the rank 9 exceeds the smaller side"),
        (
            init_lora_ga,
            BASE,
            BATCHES,
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "random"}},
            "direction 'random' needs a key",
        ),
        (
            init_eva,
            BASE,
            BATCHES,
            {"target_modules": ["q_proj", "embed_tokens"]},
            "model/embed_tokens/embedding: inputs are watched of kernels",
        ),
        (
            init_eva,
            BASE,
            BATCHES,
            {"target_parameters": ["q_proj.weight"], "target_modules": None},
            "init_eva: ranks are dealt out to modules, and target_parameters names none",
        ),
    ],
)
def test_wrong_input_is_refused(start, base, batches, fields, message):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    with pytest.raises(InputError, match=message) as raised:
        start(loss if start is init_lora_ga else forward, base, config, batches, layouts=LAYOUTS)
    assert "\n" not in str(raised.value)


def test_a_layer_that_is_not_used_is_named():
    model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((9, 4))
    params = {**model.init(KEY, x)["params"], "idle": {"kernel": jnp.ones((4, 4))}}
    config = LoraConfig(r=2, target_modules="all-linear")

    def run(params, batch):
        return lora_linen(model).apply({"params": params}, batch)

    for start in (init_eva, init_corda):
        with pytest.raises(InputError, match="idle/kernel: its inputs were not seen"):
            start(run, params, config, [jax.random.normal(KEY, (9, 4))])


def test_a_quantized_base_cannot_be_moved():
    params = {"q": {"kernel": quantize(jax.random.normal(KEY, (64, 64)), QuantConfig())}}
    for start in (init_corda, init_lora_ga):
        with pytest.raises(InputError, match="q/kernel: is quantized already"):
            start(forward, params, LoraConfig(r=2, target_modules=["q"]), BATCHES)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_without_data_there_is_no_such_start(init, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    for refused in (init_adapter, init_with_base):
        with pytest.raises(InputError, match=f"call adapters.init_{init}"):
            refused(KEY, BASE, config, layouts=LAYOUTS)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_an_adapter_whose_base_was_moved_is_not_read(init, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = init_adapter(KEY, BASE, config, layouts=LAYOUTS)
    save_adapter(tmp_path / "adapter", adapter, config, layouts=LAYOUTS)
    file = tmp_path / "adapter" / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"init_lora_weights": init}))
    with pytest.raises(InputError, match=f"init_lora_weights='{init}' changed the base"):
        load_adapter(tmp_path / "adapter", BASE, layouts=LAYOUTS)
    # PEFT's conversion leaves the options of the start, which then mean nothing.
    file.write_text(json.dumps(plain | {f"{init}_config": {}}))
    assert load_adapter(tmp_path / "adapter", BASE, layouts=LAYOUTS)[1].init_lora_weights is True
