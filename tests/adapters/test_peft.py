"""PEFT's files: what others wrote, round trips, and everything that can be wrong with one."""

import errno
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import InputError, LoraConfig, combine, init_adapter, lora_linen
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.lora import KernelLayout

LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
KEY = jax.random.key(0)


def logits(pretrained, adapter, ids):
    params = combine(pretrained.params, adapter)
    model = lora_linen(pretrained.module)
    return jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, jnp.asarray(ids))


@pytest.mark.parametrize(
    "name",
    [
        "lora_r8_all",
        "rslora_r16_qv",
        "rank_alpha_pattern",
        "regex_target",
        "dora_r4_all",
        "pissa_r4",
        "embed_lora",
    ],
)
def test_adapters_that_peft_made(stories, peft_made, name):
    directory, reference = peft_made(name)
    adapter, config = load_adapter(directory, stories.params, layouts=LAYOUTS)
    expected = reference["adapter_logits"]
    largest = np.abs(expected).max()
    assert np.abs(expected - reference["base_logits"]).max() > 0.1 * largest
    ours = logits(stories, adapter, reference["input_ids"].astype(np.int32))
    assert np.abs(ours - expected).max() <= 1e-5 * largest
    assert config.adapter_dtype == "float32"


@pytest.mark.parametrize(
    "name", ["lora_r8_all", "rank_alpha_pattern", "regex_target", "dora_r4_all"]
)
def test_written_again_bit_for_bit(stories, peft_made, tmp_path, name):
    directory, _ = peft_made(name)
    adapter, config = load_adapter(directory, stories.params, layouts=LAYOUTS)
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS, base_model="stories260K-hf")
    theirs, ours = (load_file(d / "adapter_model.safetensors") for d in (directory, tmp_path / "a"))
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype
        np.testing.assert_array_equal(value, ours[key])
    theirs, ours = (
        json.loads((d / "adapter_config.json").read_text()) for d in (directory, tmp_path / "a")
    )
    assert list(ours) == sorted(theirs)
    different = {k for k in ours if ours[k] != theirs[k]} - {"peft_version"}
    assert different <= {"target_modules", "lora_alpha", "alpha_pattern"}
    if isinstance(ours["target_modules"], list):
        assert set(ours["target_modules"]) == set(theirs["target_modules"])
    again, _ = load_adapter(tmp_path / "a", stories.params, layouts=LAYOUTS)
    assert_equal(adapter, again)


def test_what_is_missing_is_named(stories, peft_made):
    with pytest.raises(InputError) as error:
        load_adapter(peft_made("oldbin_r8_qv")[0], stories.params, layouts=LAYOUTS)
    assert "pickled weights are never opened" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("NEG_prompt_tuning_gpt2", "peft_type 'PROMPT_TUNING' is not supported"),
        ("gpt2_oldbin_r8", "made for another base"),
        ("gpt2_r8_cattn_cproj_faninfanout", "made for another base"),
        ("phuongsky_gpt2", "made for another base"),
        ("bertbase_mts_r8", "made for another base"),
        ("llama32-1b_r8_qv", "made for another base"),
        ("qwen25-05b_r8_qv", "made for another base"),
    ],
)
def test_published_adapters_that_do_not_fit(stories, data_dir, name, word):
    with pytest.raises(InputError) as error:
        load_adapter(data_dir / "adapters" / name, stories.params, layouts=LAYOUTS)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama32-1b_r8_qv", "qwen25-05b_r8_qv", "gemma3-270m_r4_qv"])
def test_published_adapters_of_decoders(data_dir, safetensors_shapes, name):
    directory = data_dir / "adapters" / name
    shapes = safetensors_shapes(directory / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers."
    numbers = {int(key.removeprefix(prefix).split(".")[0]) for key in shapes}

    def kernel(module):
        key = f"{prefix}0.self_attn.{module}"
        d_in, d_out = shapes[f"{key}.lora_A.weight"][1], shapes[f"{key}.lora_B.weight"][0]
        return {"kernel": jax.ShapeDtypeStruct((len(numbers), d_in, d_out), jnp.bfloat16)}

    base = {"model": {"layers": {"self_attn": {m: kernel(m) for m in ("q_proj", "v_proj")}}}}
    adapter, config = load_adapter(directory, base, layouts=LAYOUTS)
    tensors = load_file(directory / "adapter_model.safetensors")
    last = max(numbers)
    query = adapter["model"]["layers"]["self_attn"]["q_proj"]
    expected = tensors[f"{prefix}{last}.self_attn.q_proj.lora_B.weight"].T
    np.testing.assert_array_equal(query["lora_B"][last], expected)
    assert (query["lora_scaling"] == config.lora_alpha / config.r).all()
    assert config.adapter_dtype == str(query["lora_A"].dtype)


def test_an_encoder_with_a_head_of_its_own(data_dir, safetensors_shapes):
    """PEFT lists every name a head may have in `modules_to_save`; the base has one of them."""
    directory = data_dir / "adapters" / "bertbase_mts_r8"
    leaves = {}
    for key, shape in safetensors_shapes(directory / "adapter_model.safetensors").items():
        path = key.removeprefix("base_model.model.").replace(".", "/")
        module, _, leaf = path.rpartition("/")
        if "lora_A" in path:
            leaves[module.removesuffix("/lora_A") + "/kernel"] = (shape[1], 768)
        elif "lora_" not in path:
            leaves[f"{module}/{leaf.replace('weight', 'kernel')}"] = shape[::-1]
    from lora_jax._tree import tree_from_paths

    base = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaves.items()}
    adapter, config = load_adapter(directory, tree_from_paths(base))
    assert config.modules_to_save == ["classifier"]
    head = load_file(directory / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    np.testing.assert_array_equal(adapter["classifier"]["kernel"], head.T)


def small(dtype="float32", **fields):
    params = {
        "model": {
            "layers": {
                "q_proj": {"kernel": jax.random.normal(KEY, (3, 4, 6)), "bias": jnp.ones((3, 6))},
                "v_proj": {"kernel": jax.random.normal(KEY, (3, 4, 3)), "bias": jnp.ones((3, 3))},
                "norm": {"weight": jnp.ones((3, 4))},
            }
        },
        "lm_head": {"kernel": jax.random.normal(KEY, (4, 5)), "bias": jnp.ones(5)},
    }
    config = LoraConfig(
        **{"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False,
           "adapter_dtype": dtype, **fields})  # fmt: skip
    return params, init_adapter(KEY, params, config, layouts=LAYOUTS), config


def assert_equal(one, other):
    one, other = dict(leaves_with_path(one)), dict(leaves_with_path(other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype, path
        assert np.asarray(value).tobytes() == np.asarray(other[path]).tobytes(), path


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"target_modules": "all-linear", "layers_to_transform": [0, 2]},
        {"rank_pattern": {r"layers\.1\.q_proj": 1}, "alpha_pattern": {"v_proj": 5}},
        {"use_rslora": True, "lora_alpha": 7.5},
        {"modules_to_save": ["lm_head", "norm"]},
        {"lora_bias": True, "dtype": "bfloat16"},
        {"bias": "all", "target_modules": ["v_proj"]},
        {"bias": "lora_only", "lora_bias": True},
        {"bias": "all", "lora_bias": True, "trainable_token_indices": {"lm_head": [3, 1]}},
        {"bias": "all", "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
        {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
    ],
)
def test_round_trip_is_bitwise(tmp_path, fields):
    params, adapter, config = small(**fields)
    save_adapter(tmp_path / "new" / "adapter", adapter, config, layouts=LAYOUTS)
    loaded, read = load_adapter(tmp_path / "new" / "adapter", params, layouts=LAYOUTS)
    assert_equal(adapter, loaded)
    if config.target_modules != "all-linear":
        assert read.target_modules == config.target_modules
    assert read.lora_alpha == config.lora_alpha
    assert read.adapter_dtype == config.adapter_dtype
    for field in ("bias", "lora_bias", "fan_in_fan_out", "layers_pattern"):
        assert getattr(read, field) == getattr(config, field)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica"])
def test_how_an_adapter_over_its_own_base_began_changes_nothing(tmp_path, init):
    params, adapter, config = small(r=2)
    save_adapter(tmp_path, adapter, config, layouts=LAYOUTS)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    loaded, read = load_adapter(tmp_path, params, layouts=LAYOUTS)
    assert_equal(adapter, loaded)
    assert read.init_lora_weights == (True if init == "mica" else init)


def test_layers_are_trimmed_to_their_rank(tmp_path):
    _, adapter, config = small(
        rank_pattern={r"layers\.1\.q_proj": 1},
        layers_to_transform=[0, 1],
        target_modules=["q_proj"],
    )
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {
        "base_model.model.model.layers.0.q_proj.lora_A.weight": (3, 4),
        "base_model.model.model.layers.0.q_proj.lora_B.weight": (6, 3),
        "base_model.model.model.layers.1.q_proj.lora_A.weight": (1, 4),
        "base_model.model.model.layers.1.q_proj.lora_B.weight": (6, 1),
    }


def decay(adapter):
    query = adapter["model"]["layers"]["q_proj"]
    query["lora_scaling"] = query["lora_scaling"] * 0.999


def test_a_scaling_that_was_trained_is_refused(tmp_path):
    _, adapter, config = small()
    decay(adapter)
    with pytest.raises(InputError, match=r"q_proj/lora_scaling is .*freeze_base"):
        save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_saved(tmp_path):
    params, adapter, config = small()
    with pytest.raises(InputError, match="pass the layouts"):
        save_adapter(tmp_path / "a", adapter, config)
    config = LoraConfig(r=4, target_modules="all-linear")
    bare = init_adapter(KEY, {"kernel": jnp.ones((5, 4))}, config)
    with pytest.raises(InputError, match="a layer without a name"):
        save_adapter(tmp_path / "a", bare, config)
    assert list(tmp_path.iterdir()) == []


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LAST = "base_model.model.model.layers.2.q_proj.lora_A.weight"


def truncate(directory, count):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:count])


DAMAGE = {
    "cut short": (lambda d: truncate(d, -5), "not a whole safetensors file"),
    "cut in the header": (lambda d: truncate(d, 40), "not a whole safetensors file"),
    "empty": (lambda d: truncate(d, 0), "not a whole safetensors file"),
    "garbage": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "not a whole safetensors file",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no such file"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "no such file"),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text('{"r": 8,'), "not JSON"),
    "not text": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "not an object": (lambda d: (d / "adapter_config.json").write_text("[]"), "JSON object"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(LAST)), f"no tensor {LAST}"),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update(more=np.zeros(1))),
        "no place for more; the adapter was made for another base",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({LAST: np.zeros((3, 5), np.float32)})),
        "has shape (3, 5), this base needs (3, 4)",
    ),
    "another rank": (lambda d: edit_config(d, r=2), "this base needs (2, 4)"),
    "rank as text": (lambda d: edit_config(d, r="3"), "positive integer, got '3'"),
    "null": (lambda d: edit_config(d, lora_dropout=None), "lora_dropout must be"),
    "other targets": (lambda d: edit_config(d, target_modules=["c_attn"]), "another base"),
    "unknown field": (lambda d: edit_config(d, lora_alhpa=3), "did you mean 'lora_alpha'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapters_are_refused_in_one_line(tmp_path, kind):
    params, adapter, config = small()
    directory = tmp_path / "a"
    save_adapter(directory, adapter, config, layouts=LAYOUTS)
    damage, word = DAMAGE[kind]
    damage(directory)
    with pytest.raises(InputError) as error:
        load_adapter(directory, params, layouts=LAYOUTS)
    message = str(error.value)
    assert word in message and "\n" not in message and message.startswith(str(directory))


def test_patterns_that_match_nothing_are_no_error_in_a_file(tmp_path):
    """PEFT keeps them, and the tensors already say whether the adapter fits."""
    params, adapter, config = small()
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    edit_config(
        tmp_path / "a",
        target_modules=["q_proj", "v_proj", "c_attn"],
        exclude_modules=["vision"],
        rank_pattern={"fc1": 9},
    )
    loaded, _ = load_adapter(tmp_path / "a", params, layouts=LAYOUTS)
    assert_equal(adapter, loaded)


def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["lora_jax._files.save_file", "os.replace", "os.fsync"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, place, exists):
    _, adapter, config = small()
    directory = tmp_path / "a"
    if exists:
        save_adapter(directory, adapter, config, layouts=LAYOUTS)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = jax.tree.map(lambda x: x, adapter)
    other["model"]["layers"]["q_proj"]["lora_B"] += 1
    monkeypatch.setattr(place, fail)
    with pytest.raises(InputError, match="cannot write: No space left on device") as error:
        save_adapter(directory, other, config, layouts=LAYOUTS)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert directory.exists() == exists


def test_patterns_keep_their_order(tmp_path):
    base = {"a": {"q_proj": {"kernel": jnp.zeros((4, 6))}}}
    config = LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={"q_proj": 32, "a.q_proj": 8})
    adapter = init_adapter(jax.random.key(0), base, config)
    save_adapter(tmp_path / "adapter", adapter, config)
    loaded, _ = load_adapter(tmp_path / "adapter", base)
    assert loaded["a"]["q_proj"]["lora_scaling"] == adapter["a"]["q_proj"]["lora_scaling"] == 16


def test_layouts_that_name_the_parameter(tmp_path):
    base = {"layers": {"q_proj": {"kernel": jnp.zeros((3, 4, 6))}}}
    layouts = {"layers/q_proj/kernel": KernelLayout((0,), "layers")}
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = init_adapter(jax.random.key(0), base, config, layouts=layouts)
    save_adapter(tmp_path / "adapter", adapter, config, layouts=layouts)
    loaded, _ = load_adapter(tmp_path / "adapter", base, layouts=layouts)
    assert (loaded["layers"]["q_proj"]["lora_A"] == adapter["layers"]["q_proj"]["lora_A"]).all()
