"""What a report tells of a config is what `init_adapter` makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import InputError, LoraConfig, init_adapter, quantize, trainable_mask
from lora_jax._tree import leaves_with_path, map_with_path, tree_bytes
from lora_jax.lora import KernelLayout, target_report

PARAMS = {
    "embed": {"embedding": jnp.ones((9, 8))},
    "layers": {
        "up": {"kernel": jnp.ones((3, 8, 12)), "bias": jnp.ones((3, 12))},
        "norm": {"scale": jnp.ones((3, 8))},
        "experts": {"down": jnp.ones((3, 2, 12, 8))},
    },
    "conv": {"kernel": jnp.ones((3, 3, 8, 4))},
    "head": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)},
}
LAYOUTS = {
    "layers": KernelLayout(stack="layers"),
    "layers/experts/down": KernelLayout((0,), "layers", experts=True),
    "conv/kernel": KernelLayout((0, 1, 2), window=(3, 3)),
}
CONFIGS = {
    "a stack": dict(target_modules=["up"], layers_to_transform=[0, 2], layers_pattern=["layers"]),
    "experts": dict(target_modules=["up"], target_parameters=["experts.down"]),
    "a convolution": dict(target_modules=["conv", "embed"]),
    "everything linear": dict(target_modules="all-linear", use_dora=True),
    "ranks of their own": dict(target_modules=["up", "head"], rank_pattern={"1.up": 1}),
    "in full": dict(target_modules=["up"], modules_to_save=["head"], bias="all"),
    "rows": dict(target_modules=["up"], trainable_token_indices=[3, 5]),
    "biases": dict(target_modules=["up", "head"], lora_bias=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_adapter(name):
    config = LoraConfig(r=2, init_lora_weights=False, **CONFIGS[name])
    report = target_report(PARAMS, config, layouts=LAYOUTS)
    adapter = init_adapter(jax.random.key(0), PARAMS, config, layouts=LAYOUTS)
    chosen = dict(leaves_with_path(trainable_mask(adapter, config)))
    trained = {path: x for path, x in leaves_with_path(adapter) if chosen[path]}
    assert report.trainable_bytes == tree_bytes(trained)
    # What only pads layers to a common rank is zero in both factors, and drawn elsewhere.
    factors = {path: x for path, x in trained.items() if path.endswith(("lora_A", "lora_B"))}
    numbers = sum(np.count_nonzero(x) for x in factors.values())
    numbers += sum(x.size for path, x in trained.items() if path not in factors)
    assert report.trainable == numbers
    assert report.frozen == sum(x.size for x in jax.tree.leaves(PARAMS))
    told = {t.path for t in report.targets} | {path for path, *_ in report.whole + report.left_out}
    assert told == set(dict(leaves_with_path(PARAMS)))


def test_why_parameters_are_left_out():
    config = LoraConfig(
        target_modules=["up", "head"],
        exclude_modules=["head"],
        layers_to_transform=[0, 1],
        layers_pattern=["layers"],
    )
    report = target_report(PARAMS, config, layouts=LAYOUTS)
    why = {path: words for path, _, words in report.left_out}
    assert why["head/kernel"] == "exclude_modules" and why["head/bias"] == "one axis"
    assert why["layers/norm/scale"] == "one axis" and why["conv/kernel"] == "no pattern matches"
    assert report.patterns[:2] == (("target_modules", "up", 3), ("target_modules", "head", 1))
    assert "layers/up/kernel  2 of 3     8  8 -> 12" in str(report)


def test_shown_in_a_notebook():
    config = LoraConfig(target_modules="(?P<any>.*up)")
    report = lora_jax.report(PARAMS, config, layouts=LAYOUTS)
    page = report._repr_html_()
    assert "<td>layers/up/kernel</td>" in page and "(?P&lt;any&gt;.*up)" in page


def test_shapes_and_four_bits():
    config = LoraConfig(target_modules=["head"], r=2)
    dense = target_report(PARAMS, config, layouts=LAYOUTS)
    shapes = map_with_path(lambda _, x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert target_report(shapes, config, layouts=LAYOUTS) == dense
    small = PARAMS | {"head": {"kernel": quantize(PARAMS["head"]["kernel"])}}
    report = target_report(small, config, layouts=LAYOUTS)
    assert report.frozen == dense.frozen - 5 and report.frozen_bytes < dense.frozen_bytes


def test_what_matches_nothing_is_refused():
    with pytest.raises(InputError, match="'heads' matches nothing"):
        target_report(PARAMS, LoraConfig(target_modules=["heads"]), layouts=LAYOUTS)
