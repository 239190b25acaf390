"""Which parameters are adapted; whatever matches nothing is an error that lists what there is."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax import InputError, LoraConfig, quantize, trainable_mask
from lora_jax.lora import KernelLayout, find_targets, saved_modules

STACK = {"model/layers": KernelLayout(stack="model/layers")}


def tree(layers=3):
    def kernel(d_in, d_out):
        return {"kernel": jax.ShapeDtypeStruct((layers, d_in, d_out), jnp.float32)}

    return {
        "model": {
            "embed_tokens": {"embedding": jax.ShapeDtypeStruct((7, 4), jnp.float32)},
            "layers": {
                "attn": {"q_proj": kernel(4, 6), "v_proj": kernel(4, 2)},
                "mlp": {"up_proj": kernel(4, 8)},
                "norm": {"weight": jax.ShapeDtypeStruct((layers, 4), jnp.float32)},
            },
        },
        "lm_head": {"kernel": jax.ShapeDtypeStruct((4, 7), jnp.float32)},
    }


def found(**fields):
    config = LoraConfig(**fields)
    return {t.path.split("/")[-2]: t for t in find_targets(tree(), config, layouts=STACK)}


def test_all_linear_leaves_out_head_embedding_and_norms():
    assert set(found(target_modules="all-linear")) == {"q_proj", "v_proj", "up_proj"}


def test_excluding_the_head_from_all_linear_is_no_error():
    targets = found(target_modules="all-linear", exclude_modules=["lm_head", "up_proj"])
    assert set(targets) == {"q_proj", "v_proj"}


def test_layers_become_ranks_of_zero():
    targets = found(target_modules=["q_proj"], layers_to_transform=[0, 2], rank_pattern={
        r"layers\.2\.attn\.q_proj": 16})  # fmt: skip
    assert targets["q_proj"].ranks == (8, 0, 16)
    assert targets["q_proj"].scalings == (1.0, 0.0, 0.5)
    assert targets["q_proj"].names[2] == "model/layers/2/attn/q_proj"


@pytest.mark.parametrize("name", ["model.layers.0.attn.q_proj", "model/layers/0/attn/q_proj"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_name_in_full_says_its_layer_itself(name, layer):
    targets = found(target_modules=[name, "v_proj"], layers_to_transform=[layer])
    assert targets["q_proj"].ranks == (8, 0, 0)
    assert [rank > 0 for rank in targets["v_proj"].ranks] == [i == layer for i in range(3)]


def test_no_layers_means_all():
    assert found(target_modules=["q_proj"], layers_to_transform=[])["q_proj"].ranks == (8, 8, 8)


def test_nothing_below_a_saved_module_is_adapted():
    config = LoraConfig(target_modules=r".*_proj", modules_to_save=["mlp"])
    assert {t.path.split("/")[-2] for t in find_targets(tree(), config, layouts=STACK)} == {
        "q_proj",
        "v_proj",
    }
    assert saved_modules(tree(), config) == ("model/layers/mlp/up_proj/kernel",)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "k_proj"]}, "'k_proj' matches nothing"),
        ({"target_modules": r"q_proj"}, "'q_proj' matches nothing"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["x"]}, "exclude_modules 'x'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern 'v_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "alpha_pattern 'v_proj'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 3]}, "layers_to_transform '3'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module is left"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, "list of target_modules"),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": 0,
                "layers_pattern": ["layers", "h"],
            },
            "layers_pattern 'h' matches nothing",
        ),
    ],
)
def test_what_matches_nothing_is_an_error(fields, word):
    with pytest.raises(InputError) as error:
        find_targets(tree(), LoraConfig(**fields), layouts=STACK)
    assert word in str(error.value) and "\n" not in str(error.value)
    if "matches nothing" in word or "missing" in word:
        assert "There is: embed_tokens, q_proj, v_proj, up_proj, lm_head" in str(error.value)


def test_a_module_with_parameters_of_its_own_says_how_they_are_named():
    params = {"attn": {"q_einsum": {"w": jnp.ones((4, 4))}, "q_einsum_2": {"w": jnp.ones((4, 4))}}}
    with pytest.raises(InputError, match=r"itself: it is a module.*, such as q_einsum\.w\. There"):
        find_targets(params, LoraConfig(target_modules=["q_einsum"]))
    (target,) = find_targets(params, LoraConfig(target_modules=["q_einsum.w"]))
    assert target.names == ("attn/q_einsum/w",)
    with pytest.raises(InputError, match=r"one regular expression for paths; \[q_einsum\] means"):
        find_targets(params, LoraConfig(target_modules="q_einsum"))


def test_a_list_at_the_root_needs_its_name():
    """PEFT's default looks for a list below another module."""
    params = {"h": {"0": {"q": {"kernel": jnp.ones((4, 4))}}}}
    fields = dict(target_modules=["q"], layers_to_transform=0)
    with pytest.raises(InputError, match="below no other module needs layers_pattern"):
        find_targets(params, LoraConfig(**fields))
    (target,) = find_targets(params, LoraConfig(layers_pattern="h", **fields))
    assert target.names == ("h/0/q",)


def test_a_saved_module_that_is_not_there():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    with pytest.raises(InputError, match="modules_to_save 'score' matches nothing"):
        saved_modules(tree(), config)


def test_axes_that_nobody_explained():
    params = {"attn": {"q": {"kernel": jnp.ones((4, 2, 3))}}}
    config = LoraConfig(r=2, target_modules=["q"])
    with pytest.raises(InputError, match=r"attn/q/kernel has 3 axes.*KernelLayout"):
        find_targets(params, config)
    (target,) = find_targets(params, config, layouts={"attn/q": KernelLayout((0, 1))})
    assert (target.d_in, target.d_out) == (8, 3)


def test_a_quantized_kernel_explains_itself():
    params = {"o": {"kernel": quantize(jnp.ones((2, 3, 4)), contracting=2)}}
    (target,) = find_targets(params, LoraConfig(target_modules=["o"]))
    assert (target.d_in, target.d_out) == (6, 4)


def test_what_is_no_contraction_is_left_out_of_all_linear():
    params = {"conv": {"kernel": jnp.ones((3, 4, 4))}, "out": {"kernel": jnp.ones((4, 5))}}
    layouts = {"conv/kernel": KernelLayout(contracting=())}
    (target,) = find_targets(params, LoraConfig(target_modules="all-linear"), layouts=layouts)
    assert target.path == "out/kernel"
    left_out = LoraConfig(target_modules="all-linear", exclude_modules=["conv"])
    assert find_targets(params, left_out, layouts=layouts) == (target,)
    with pytest.raises(InputError, match="conv/kernel has 3 axes and .* no plain contraction"):
        find_targets(params, LoraConfig(target_modules=["conv"]), layouts=layouts)
    with pytest.raises(InputError, match="a shape alone does not tell"):
        find_targets(params, LoraConfig(target_modules="all-linear"))


def test_mask_of_saved_modules():
    adapter = {"q": {"lora_A": 1, "lora_B": 2, "lora_scaling": 3}, "head": {"kernel": 4}}
    config = LoraConfig(target_modules=["q"], modules_to_save=["head"])
    assert trainable_mask(adapter, config) == {
        "q": {"lora_A": True, "lora_B": True, "lora_scaling": False},
        "head": {"kernel": True},
    }
    assert not trainable_mask(adapter)["head"]["kernel"]
