"""Several adapters made into one: what holds whatever the numbers are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import InputError, LoraConfig, init_adapter, partition
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import load_adapter, save_adapter, weighted_adapter
from lora_jax.adapters._rule import Rule
from lora_jax.lora import KernelLayout

LAYOUTS = {"layers": KernelLayout(stack="layers")}
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
TYPES = ["svd", "linear", "cat", *PRUNING, *(f"{name}_svd" for name in PRUNING)]
KEY = jax.random.key(7)


def zeros(*shape):
    return np.zeros(shape, np.float32)


BASE = {
    "layers": {"q": {"kernel": zeros(2, 5, 6)}, "v": {"kernel": zeros(2, 5, 3)}},
    "embed": {"embedding": zeros(7, 5)},
    "head": {"kernel": zeros(5, 7)},
}
SINGLE = {
    "layers": {
        str(i): {"q": {"kernel": zeros(5, 6)}, "v": {"kernel": zeros(5, 3)}} for i in range(2)
    },
    "embed": BASE["embed"],
}


LIST = {"layers_pattern": "layers"}


def make(seed, base=BASE, layouts=LAYOUTS, **fields):
    fields = {"r": 3, "lora_alpha": 5 + seed, "target_modules": ["q", "embed"], **fields}
    config = LoraConfig(init_lora_weights=False, **fields)
    return init_adapter(jax.random.key(seed), base, config, layouts=layouts), config


def combined(pairs, weights, kind, layouts=LAYOUTS, **options):
    if kind.removesuffix("_svd") in PRUNING:
        options = {"density": 0.6, "key": KEY, **options}
    return weighted_adapter(pairs, weights, kind, layouts=layouts, **options)


def deltas(adapter):
    """scaling·A·B of every adapted parameter, in float64."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in leaves_with_path(adapter)}
    prefixes = [path.removesuffix("lora_A") for path in leaves if path.endswith("lora_A")]
    return {
        p: leaves[f"{p}lora_scaling"][..., None, None]
        * (leaves[f"{p}lora_A"] @ leaves[f"{p}lora_B"])
        for p in prefixes
    }


def summed(pairs, weights):
    total = {}
    for (adapter, _), weight in zip(pairs, weights, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(got[path], delta, rtol=0, atol=tolerance * abs(delta).max())


@functools.cache
def different():
    return [
        make(0, rank_pattern={"layers.1.q": 2}, use_rslora=True),
        make(1, r=1, target_modules=["q", "v"]),
        make(2, r=2, target_modules=["v"], layers_to_transform=[1], layers_pattern="layers"),
    ]


@settings(max_examples=5)
@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_cat_is_the_sum(weights):
    adapter, config = combined(different(), weights, "cat")
    expected = summed(different(), weights)
    for path, delta in deltas(adapter).items():
        np.testing.assert_allclose(delta, expected[path], atol=1e-5)
    assert config.r == config.lora_alpha == 3 + 1 + 2
    assert adapter["layers"]["q"]["lora_A"].shape == (2, 5, 6)
    np.testing.assert_array_equal(adapter["layers"]["v"]["lora_scaling"], 1)


@pytest.mark.parametrize("rank", [None, 2, 6, 9])
def test_svd_is_the_nearest_to_the_sum(rank):
    weights = [0.7, -1.2, 0.4]
    adapter, config = combined(different(), weights, "svd", svd_rank=rank)
    assert config.r == config.lora_alpha == adapter["layers"]["q"]["lora_A"].shape[-1]
    assert config.r == (rank or 3)
    for path, delta in summed(different(), weights).items():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        nearest = (u[..., : config.r] * s[..., None, : config.r]) @ vt[..., : config.r, :]
        np.testing.assert_allclose(deltas(adapter)[path], nearest, atol=1e-5 * s.max())


@pytest.mark.parametrize("kind", TYPES)
def test_the_result_can_be_saved(tmp_path, kind):
    """Its config gives an adapter to the layers that have one, of its rank, and to no others."""
    ranks = {"rank_pattern": {"layers.1.q": 2}, "use_rslora": True}
    pairs = [make(0, target_modules=["q"], **ranks), make(1, target_modules=["q", "v"], **ranks)]
    options = {"svd_rank": 7} if kind.endswith("svd") else {}  # above the smaller side
    adapter, config = combined(pairs, [0.5, -0.3], kind, **options)
    assert config.target_modules == ["q", "v"] and config.scaling("q") == 1
    save_adapter(tmp_path, adapter, config, layouts=LAYOUTS)
    loaded, _ = load_adapter(tmp_path, BASE, layouts=LAYOUTS)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([{"target_modules": "all-linear"}] * 2, "all-linear"),
        ([{"target_modules": ".*q"}, {"target_modules": ".*(v|head)"}], "(.*q)|(.*(v|head))"),
        (
            [{"target_modules": ["q"]}, {"target_modules": "all-linear", "exclude_modules": ["v"]}],
            ["layers/0/q", "layers/1/q", "head"],
        ),
        (
            [
                {"target_modules": ["q"], "layers_to_transform": [1], **LIST},
                {"target_modules": ["q", "v"], "layers_to_transform": 0, **LIST},
            ],
            ["layers/0/q", "layers/1/q", "layers/0/v"],
        ),
    ],
)
def test_the_config_chooses_the_modules_of_all(tmp_path, fields, expected):
    base = {name: BASE[name] for name in ("layers", "head")}
    pairs = [make(i, base, **own) for i, own in enumerate(fields)]
    adapter, config = combined(pairs, [1.0, 1.0], "cat")
    assert config.target_modules == expected
    save_adapter(tmp_path, adapter, config, layouts=LAYOUTS)
    loaded, _ = load_adapter(tmp_path, base, layouts=LAYOUTS)
    assert_close(deltas(loaded), summed(pairs, [1.0, 1.0]))


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_biases_on_b_are_summed(kind):
    """Also those of an adapter that has none, or not in every layer."""
    pairs = [
        make(0, target_modules=["q"], lora_bias=True),
        make(1, target_modules=["q", "v"], layers_to_transform=[1], lora_bias=True, **LIST),
        make(2, target_modules=["q"]),
    ]
    weights = [0.7, -2.0, 1.0]
    adapter, config = combined(pairs, weights, kind, svd_rank=None)
    q = adapter["layers"]["q"]
    expected = sum(
        w * own["layers"]["q"]["lora_scaling"][:, None] * own["layers"]["q"]["lora_B_bias"]
        for w, (own, _) in zip(weights[:2], pairs[:2], strict=True)
    )
    assert config.lora_bias and (q["lora_scaling"] == 1).all()
    np.testing.assert_allclose(q["lora_B_bias"], expected, rtol=1e-5, atol=1e-6)
    assert not adapter["layers"]["v"]["lora_B_bias"][0].any()
    with pytest.raises(InputError, match="linear has no rule for the biases on B"):
        combined(pairs, weights, "linear")


def test_biases_of_the_base_are_not_summed():
    base = {"layers": {"q": {"kernel": zeros(2, 5, 6), "bias": zeros(2, 6)}}}
    pair = make(0, base, target_modules=["q"], bias="all")
    with pytest.raises(InputError, match="adapter 0 holds layers/q/bias whole"):
        combined([pair], [1.0], "cat")


@pytest.mark.parametrize("kind", TYPES)
def test_stacked_layers_equal_single_ones(kind):
    """Masks too: each layer folds in its own name."""
    fields = [{"rank_pattern": {"0.q": 2}}, {"rank_pattern": {"0.q": 2}, "lora_alpha": 1}]
    stacked, single = (
        combined([make(i, base, own, **f) for i, f in enumerate(fields)], [0.8, -0.5], kind, own)[0]
        for base, own in ((BASE, LAYOUTS), (SINGLE, None))
    )
    for i in range(2):
        for part in ("lora_A", "lora_B", "lora_scaling"):
            np.testing.assert_allclose(
                stacked["layers"]["q"][part][i],
                single["layers"][str(i)]["q"][part],
                rtol=1e-5,
                atol=1e-6,
            )
    np.testing.assert_array_equal(
        stacked["embed"]["embedding_lora_A"], single["embed"]["embedding_lora_A"]
    )


@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "magnitude_prune_svd"])
def test_linear_in_the_weights(kind):
    """Twice the weights are twice the delta, and the opposite weights its opposite."""
    pairs = [make(0), make(1)]
    once = deltas(combined(pairs, [0.6, 0.3], kind)[0])
    twice = deltas(combined(pairs, [1.2, 0.6], kind)[0])
    opposite = deltas(combined(pairs, [-0.6, -0.3], kind)[0])
    assert_close(twice, {path: 2 * delta for path, delta in once.items()})
    assert_close(opposite, {path: -delta for path, delta in once.items()})


def test_dare_keeps_the_expected_factor():
    """The mean over keys is the factor: within five times its own standard error."""
    pairs, count = [make(i, target_modules=["embed"]) for i in range(2)], 400

    def factor(key):
        adapter, _ = combined(pairs, [0.6, 0.3], "dare_linear", key=key)
        return adapter["embed"]["embedding_lora_B"]

    found = np.asarray(jax.vmap(factor)(jax.random.split(KEY, count)), np.float64)
    expected = combined(pairs, [0.6, 0.3], "linear")[0]["embed"]["embedding_lora_B"]
    error = found.std(axis=0) / np.sqrt(count)
    assert np.all(error > 0) and np.all(np.abs(found.mean(axis=0) - expected) < 5 * error)


@pytest.mark.parametrize("kind", PRUNING)
def test_density_one_prunes_nothing(kind):
    pairs = [make(0), make(0)]
    linear = combined(pairs, [0.5, 0.5], "linear")[0]
    pruned = combined(pairs, [0.5, 0.5], kind, density=1.0)[0]
    # Equal adapters agree in every sign, and ties takes their mean where linear takes the sum.
    factor = 0.25 if kind.endswith("ties") else 1.0
    expected = {path: factor * delta for path, delta in deltas(linear).items()}
    assert_close(deltas(pruned), expected)


def test_the_largest_entries_are_kept():
    adapter, config = make(0, target_modules=["embed"])
    kept = combined([(adapter, config)], [1.0], "magnitude_prune", density=0.3)[0]
    a = np.abs(np.asarray(adapter["embed"]["embedding_lora_A"]))
    mask = np.asarray(kept["embed"]["embedding_lora_A"]) != 0
    assert mask.sum() == int(0.3 * a.size) and a[mask].min() > a[~mask].max()


def test_ties_by_hand():
    def one(b):
        layer = {"lora_A": jnp.ones((2, 1)), "lora_B": jnp.array([b]), "lora_scaling": jnp.ones(())}
        return {"q": layer}, LoraConfig(r=1, lora_alpha=1, target_modules=["q"])

    pairs = [one([3.0, 1.0, -1.0]), one([-1.0, 1.0, 0.0]), one([-1.0, -4.0, 0.0])]
    for method, expected in (("total", [3.0, -4.0, -1.0]), ("frequency", [-1.0, 1.0, -1.0])):
        adapter, _ = weighted_adapter(
            pairs, [1.0, 1.0, 1.0], "ties", density=1.0, majority_sign_method=method
        )
        np.testing.assert_array_equal(adapter["q"]["lora_B"], [expected])


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties"])
def test_weights_may_be_traced(kind):
    pairs = [make(0), make(1)]

    def result(weights):
        return combined(pairs, weights, kind)[0]

    weights = jnp.array([0.6, -0.3])
    expected = deltas(result([0.6, -0.3]))
    assert_close(deltas(jax.jit(result)(weights)), expected)
    if kind == "cat":
        grads = jax.grad(lambda w: jnp.sum(result(w)["layers"]["q"]["lora_A"]))(weights)
        own = [s[0]["layers"]["q"] for s in pairs]
        sums = [jnp.sum(o["lora_A"] * o["lora_scaling"][:, None, None]) for o in own]
        np.testing.assert_allclose(grads, sums, rtol=1e-4)


def test_nothing_is_changed_and_the_first_dtype_is_kept():
    pairs = [make(0, adapter_dtype="bfloat16"), make(1)]
    before = jax.tree.map(np.array, [adapter for adapter, _ in pairs])
    adapter, config = combined(pairs, [1.0, 1.0], "cat")
    assert config.adapter_dtype == "bfloat16"
    assert adapter["layers"]["q"]["lora_A"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, before, [adapter for adapter, _ in pairs])


def whole():
    return make(0, target_modules=["q"], modules_to_save=["head"])


def test_an_adapter_without_its_whole_modules():
    _, split = partition(whole()[0], lambda path: path.startswith("head"))
    adapter, config = combined([(split, whole()[1]), make(1)], [1.0, 1.0], "cat")
    assert config.modules_to_save is None


@pytest.mark.parametrize(
    ("pairs", "options", "words"),
    [
        ([], {}, "takes one adapter or more and a weight for each, got 0"),
        ([make(0)], {"weights": [1.0, 2.0]}, "got 1 adapters and 2 weights"),
        ([make(0), make(1, r=2)], {"kind": "linear"}, "layers/0/q have ranks 3, 2; use cat"),
        ([make(0)], {"kind": "cat", "svd_rank": 2}, "svd_rank is a positive rank, for types that"),
        ([make(0)], {"svd_rank": 0}, "svd_rank is a positive rank"),
        ([make(0)], {"density": 0.5}, "svd prunes nothing, got density=0.5"),
        ([make(0)], {"kind": "ties"}, r"ties needs the density it keeps, in \(0, 1\], got None"),
        ([make(0)], {"kind": "dare_ties_svd", "density": 0.0}, "dare_ties_svd needs the density"),
        ([make(0)], {"kind": "ties", "density": 1.5}, "got 1.5"),
        ([make(0)], {"kind": "dare_linear", "density": 0.5}, "drops at random; give key="),
        ([make(0), whole()], {}, "adapter 1 holds head/kernel whole"),
        ([make(0), ({}, make(0)[1])], {}, "adapter 1 is empty"),
        ([(make(0)[0], make(1, r=2)[1])], {}, "rank 3, but the config gives 2; pass the config"),
        ([make(0)], {"layouts": None}, "pass the layouts the adapter was made with"),
        (
            [make(0, target_modules=["embed"]), make(1, {"embed": {"embedding": zeros(8, 5)}},
             target_modules=["embed"])],
            {},
            "adapters 0 and 1 differ in the shape of embed/embedding",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(pairs, options, words):
    options = {"weights": [1.0] * len(pairs), "layouts": LAYOUTS, **options}
    kind = options.pop("kind", "svd")
    with pytest.raises(InputError, match=words) as error:
        weighted_adapter(pairs, options.pop("weights"), kind, **options)
    assert "\n" not in str(error.value)


def test_a_misspelled_option_is_refused():
    with pytest.raises(InputError, match="did you mean 'dare_ties'"):
        Rule("dare_tie")
    with pytest.raises(InputError, match="majority_sign_method must be one of total, frequency"):
        Rule("ties", 0.5, "totals")
