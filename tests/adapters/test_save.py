"""Saving an adapter with another config than its own, or one that PEFT would read otherwise."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import InputError, LoraConfig, init_adapter, lora_linen, quantize
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.lora import KernelLayout

KEY = jax.random.key(0)
LAYOUTS = {"layers": KernelLayout(stack="layers")}
PREFIX = "base_model.model."


FIRST = {"layers_to_transform": [0], "layers_pattern": "layers"}


def base():
    def normal(*shape):
        return jax.random.normal(jax.random.key(len(shape)), shape)

    return {
        "embed_tokens": {"embedding": normal(7, 4).astype(jnp.bfloat16)},
        "layers": {"q_proj": {"kernel": normal(3, 4, 6)}, "v_proj": {"kernel": normal(3, 4, 2)}},
        "lm_head": {"kernel": normal(4, 7)},
        "temperature": jnp.float32(2),  # a parameter without any axis
    }


def config(**fields):
    fields = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}
    return LoraConfig(**fields)


def saved(directory, made_with, saved_with=None):
    adapter = init_adapter(KEY, base(), made_with, layouts=LAYOUTS)
    save_adapter(directory, adapter, saved_with or made_with, layouts=LAYOUTS)
    return adapter


@pytest.mark.parametrize(
    ("made_with", "saved_with", "words"),
    [
        ({}, {"r": 2, "lora_alpha": 16 / 3}, "layers/0/q_proj has rank 3, but the config gives 2"),
        ({}, {"r": 4, "lora_alpha": 32 / 3}, "layers/0/q_proj has rank 3, but the config gives 4"),
        ({}, {"lora_alpha": 9}, "lora_scaling is 2.66667 at layers/0/q_proj, but the config"),
        ({}, {"target_modules": ["v_proj"]}, "layers/0/q_proj has an adapter, but the config giv"),
        (FIRST, {}, "layers/1/q_proj has no adapter, but the config gives"),
        ({}, FIRST, "layers/1/q_proj has an adapter, but"),
        (
            {"lora_bias": True},
            {},
            "layers/q_proj has a lora_B_bias, but the config says lora_bias=F",
        ),
        ({}, {"lora_bias": True}, "layers/q_proj has no lora_B_bias, but the config says"),
        ({}, {"bias": "all"}, "bias='all', and the adapter holds no bias"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save 'lm_head' is not in the adapter"),
        ({"modules_to_save": ["lm_head"]}, {}, "holds lm_head/kernel whole, but the config's"),
        ({}, {"target_modules": None}, "has an adapter, but the config gives it none"),
    ],
)
def test_another_config_than_its_own_is_refused(tmp_path, made_with, saved_with, words):
    with pytest.raises(InputError) as error:
        saved(tmp_path / "a", config(**made_with), config(**saved_with))
    assert words in str(error.value) and "config" in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_parts_that_are_missing(tmp_path):
    adapter = init_adapter(KEY, base(), config(), layouts=LAYOUTS)
    del adapter["layers"]["q_proj"]["lora_B"]
    with pytest.raises(InputError, match="q_proj/lora_A but no layers/q_proj/lora_B"):
        save_adapter(tmp_path / "a", adapter, config(), layouts=LAYOUTS)
    with pytest.raises(InputError, match="the adapter is empty"):
        save_adapter(tmp_path / "a", {}, config())


def test_a_layer_that_is_called_embedding(tmp_path):
    """Its kernel is a linear layer's, whatever its name."""
    params = {"embedding": {"kernel": jnp.ones((4, 6))}}
    wanted = config(target_modules=["embedding"])
    adapter = init_adapter(KEY, params, wanted)
    save_adapter(tmp_path / "a", adapter, wanted)
    loaded, _ = load_adapter(tmp_path / "a", params)
    np.testing.assert_array_equal(loaded["embedding"]["lora_A"], adapter["embedding"]["lora_A"])


def edit(directory, **tensors):
    path = directory / "adapter_model.safetensors"
    save_file({**load_file(path), **{PREFIX + k: v for k, v in tensors.items()}}, path)


HEAD, TABLE = "lm_head.base_layer.weight", "embed_tokens.weight"


def test_copies_of_the_base_are_compared_and_left(tmp_path):
    """PEFT writes the head or the embedding along when it adapts them, or when asked to."""
    params, wanted = base(), config(target_modules=["q_proj", "lm_head"])
    adapter = saved(tmp_path / "a", wanted)
    kernel, table = np.asarray(params["lm_head"]["kernel"]), params["embed_tokens"]["embedding"]
    edit(tmp_path / "a", **{HEAD: kernel.T.copy(), TABLE: np.asarray(table, np.float32)})
    for given in (params, jax.eval_shape(base)):
        loaded, _ = load_adapter(tmp_path / "a", given, layouts=LAYOUTS)
        assert dict(leaves_with_path(loaded)).keys() == dict(leaves_with_path(adapter)).keys()
    for changed in (2 * kernel.T, np.zeros((9, 4), np.float32)):
        edit(tmp_path / "a", **{HEAD: changed})
        with pytest.raises(InputError, match=r"lm_head.base_layer.weight .* not this base's"):
            load_adapter(tmp_path / "a", params, layouts=LAYOUTS)


def test_a_copy_of_one_layer_of_a_stack(tmp_path):
    params = base()
    saved(tmp_path / "a", config())
    key, own = "layers.1.v_proj.weight", np.asarray(params["layers"]["v_proj"]["kernel"][1]).T
    edit(tmp_path / "a", **{key: own.copy()})
    load_adapter(tmp_path / "a", params, layouts=LAYOUTS)
    edit(tmp_path / "a", **{key: own + 1})
    with pytest.raises(InputError, match="not this base's layers/v_proj/kernel"):
        load_adapter(tmp_path / "a", params, layouts=LAYOUTS)


def test_an_embedding_that_the_head_shares_is_not_trained_whole(tmp_path):
    inner = {name: value for name, value in base().items() if name != "lm_head"}
    untied, tied = {"model": inner, "lm_head": base()["lm_head"]}, {"model": inner}
    layouts = {"model/layers": KernelLayout(stack="model/layers")}
    wanted = config(modules_to_save=["embed_tokens"])
    adapter = init_adapter(KEY, untied, wanted, layouts=layouts)
    save_adapter(tmp_path / "a", adapter, wanted, layouts=layouts)
    for refuse in (init_adapter, lambda _, *rest, **k: load_adapter(tmp_path / "a", rest[0], **k)):
        with pytest.raises(
            InputError,
            match="modules_to_save: .* shares model/embed_tokens.* ensure_weight_tying: true",
        ):
            refuse(KEY, tied, wanted, layouts=layouts)
    # Of another module nobody knows whether it has such a head.
    assert init_adapter(KEY, inner, wanted, layouts=LAYOUTS)["embed_tokens"]


@pytest.mark.parametrize("file", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16", "nf4"])
def test_copies_of_the_base_in_another_type(tmp_path, own, file):
    params = base()
    kernel = params["lm_head"]["kernel"].astype(file)
    saved(tmp_path / "a", config())
    params["lm_head"]["kernel"] = quantize(kernel) if own == "nf4" else kernel.astype(own)
    edit(tmp_path / "a", **{"lm_head.weight": np.asarray(kernel).T.copy()})
    load_adapter(tmp_path / "a", params, layouts=LAYOUTS)
    edit(tmp_path / "a", **{"lm_head.weight": np.asarray(kernel[:, ::-1]).T.copy()})
    with pytest.raises(InputError, match="not this base's lm_head/kernel"):
        load_adapter(tmp_path / "a", params, layouts=LAYOUTS)


def test_a_config_nested_beyond_measure(tmp_path):
    saved(tmp_path / "a", config())
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        load_adapter(tmp_path / "a", base(), layouts=LAYOUTS)


def test_the_whole_model_is_the_stack(tmp_path):
    kernel = base()["layers"]["q_proj"]["kernel"]
    params = {"q_proj": {"kernel": kernel}, "norm": {"scale": jnp.ones((3, 4))}}
    layouts, wanted = {"": KernelLayout(stack="")}, config(modules_to_save=["norm"])
    adapter = init_adapter(KEY, params, wanted, layouts=layouts)
    save_adapter(tmp_path / "a", adapter, wanted, layouts=layouts)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert {f"{PREFIX}2.q_proj.lora_A.weight", f"{PREFIX}2.norm.scale"} <= keys
    loaded, _ = load_adapter(tmp_path / "a", params, layouts=layouts)
    np.testing.assert_array_equal(loaded["q_proj"]["lora_B"], adapter["q_proj"]["lora_B"])


def test_files_are_as_private_as_the_user_s_umask(tmp_path):
    before = os.umask(0o027)
    try:
        saved(tmp_path / "a", config())
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()} == {0o640}


def test_a_quantized_stack_asks_for_its_layout():
    params = {"layers": {"q_proj": {"kernel": quantize(jnp.ones((3, 4, 6)), stacked=1)}}}
    with pytest.raises(InputError, match="q_proj/kernel has 3 axes, and a shape alone"):
        init_adapter(KEY, params, config())
    init_adapter(KEY, params, config(), layouts=LAYOUTS)


class Convolutions(nn.Module):
    """A stack of convolutions, and one turned around."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Conv(4, (3, 2), name="conv")(x), None

        many = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = nn.scan(Block, **many)(name="layers")(x, None)
        return nn.ConvTranspose(6, (2, 2), transpose_kernel=True, name="up")(x)


def test_convolutions_come_back(tmp_path, safetensors_shapes):
    x = jnp.ones((1, 4, 4, 4))
    params = Convolutions().init(KEY, x)["params"]
    layouts = lora_linen(Convolutions()).layouts(params, x)
    own = config(target_modules=["conv", "up"], rank_pattern={"0.conv": 2}, use_dora=True)
    adapter = init_adapter(KEY, params, own, layouts=layouts)
    save_adapter(tmp_path, adapter, own, layouts=layouts)
    shapes = safetensors_shapes(tmp_path / "adapter_model.safetensors")
    assert shapes[f"{PREFIX}layers.0.conv.lora_A.weight"] == (2, 4, 3, 2)
    assert shapes[f"{PREFIX}layers.1.conv.lora_B.weight"] == (4, 3, 1, 1)
    assert shapes[f"{PREFIX}up.lora_A.weight"] == (3, 4, 2, 2)
    assert shapes[f"{PREFIX}up.lora_magnitude_vector"] == (1, 6, 1, 1)
    loaded, again = load_adapter(tmp_path, params, layouts=layouts)
    assert again == own
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
