"""An embedding that the output head shares: what an adapter of it reaches, and merging it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
    unmerge_adapter,
    with_dropout,
)
from lora_jax.adapters import delta_spectra, load_adapter, save_adapter, weighted_adapter
from lora_jax.lora import (
    KernelLayout,
    extract_adapter,
    init_with_base,
    resize_adapter,
    tied_config,
)
from lora_jax.models import CausalLM, ModelConfig
from tests import compiled

KEY = jax.random.key(0)
IDS = jnp.arange(6)[None]
CONFIG = ModelConfig(
    vocab_size=24, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, tie_word_embeddings=True,
)  # fmt: skip
MODEL = CausalLM(CONFIG)
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."


@pytest.fixture(scope="module")
def base():
    return compiled.init(MODEL, KEY, IDS)


def config(**fields):
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens"]}
    return LoraConfig(**{**given, "init_lora_weights": False, **fields})


def made(base, **fields):
    return init_adapter(jax.random.key(1), base, config(**fields), layouts=LAYOUTS)


def apply(base, adapter, module=MODEL):
    return compiled.apply(lora_linen(module), combine(base, adapter), IDS)


def table_of(adapter):
    return adapter["model"]["embed_tokens"]


def same(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_merge_parts_the_head_from_the_look_up(base, quantized):
    if quantized:
        table = quantize(table_of(base)["embedding"], QuantConfig(block_size=32), contracting=(1,))
        base = combine(base, {"model": {"embed_tokens": {"embedding": table}}})
    adapter = made(base)
    assert "embedding_lora_untied" in table_of(adapter)
    expected = apply(base, adapter)
    merged = jax.jit(lambda b, a: merge_adapter(b, a, layouts=LAYOUTS))(base, adapter)
    parted = CausalLM(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    same(compiled.apply(parted, merged, IDS), expected)
    safe = merge_adapter(base, adapter, layouts=LAYOUTS, dtype=jnp.bfloat16, safe=True)
    assert safe["lm_head"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="head apart from its embedding; keep the base"):
        unmerge_adapter(merged, adapter, layouts=LAYOUTS)


def test_a_tied_adapter_reaches_both_and_merges_in_place(base):
    adapter = made(base, ensure_weight_tying=True)
    assert "embedding_lora_tied" in table_of(adapter)
    merged = merge_adapter(base, adapter, layouts=LAYOUTS)
    assert "lm_head" not in merged
    expected = compiled.apply(MODEL, merged, IDS)
    same(apply(base, adapter), expected)
    assert np.abs(apply(base, made(base)) - expected).max() > 0.1 * np.abs(expected).max()
    again = unmerge_adapter(merged, adapter, layouts=LAYOUTS)
    same(table_of(again)["embedding"], np.asarray(table_of(base)["embedding"]))


def test_dropout_reaches_the_tied_head_alone(base):
    """PEFT drops inputs of the head's adapter, and none of the look-up's."""
    for tied in (True, False):
        adapter = made(base, ensure_weight_tying=tied)
        dropped = apply(base, with_dropout(KEY, adapter, 0.5))
        assert bool((dropped == apply(base, adapter)).all()) is not tied


@pytest.mark.parametrize("names", [["lm_head"], ["lm_head", "embed_tokens"], "(.*q_proj|lm_head)"])
def test_naming_the_head_is_naming_the_table(base, names):
    fields = {"target_modules": names, "ensure_weight_tying": True}
    assert "embedding_lora_A" in table_of(made(base, **fields))
    whole = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    assert "embedding" in table_of(made(base, **{**fields, **whole}))
    if isinstance(names, list):
        with pytest.raises(InputError, match="names lm_head, but .* ensure_weight_tying: true"):
            made(base, target_modules=names)


def test_an_untied_base_has_nothing_to_tie(base):
    untied = combine(base, {"lm_head": {"kernel": jnp.ones((32, 24))}})
    adapter = made(untied, ensure_weight_tying=True, target_modules=["embed_tokens", "lm_head"])
    assert set(adapter["lm_head"]) == {"lora_A", "lora_B", "lora_scaling"}
    assert not {"embedding_lora_tied", "embedding_lora_untied"} & set(table_of(adapter))
    given = config(target_modules=["lm_head"], ensure_weight_tying=True)
    assert tied_config(untied, given) is given


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True, "ensure_weight_tying": True}, "belong to different axes"),
        (
            {"ensure_weight_tying": True, "alpha_pattern": {"embed_tokens": 8}},
            "the scaling 4 and lm_head, .* 1.5",
        ),
        ({"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, "train a copy"),
        ({"trainable_token_indices": {"lm_head": [1]}, "target_modules": ["q_proj"]}, "same ids"),
        (
            {
                "trainable_token_indices": {"embed_tokens": [2], "lm_head": [1]},
                "target_modules": ["q_proj"],
            },
            "give lm_head and embed_tokens the same ids",
        ),
    ],
)
def test_what_one_table_cannot_be(base, fields, words):
    with pytest.raises(InputError, match=words) as error:
        made(base, **fields)
    assert "\n" not in str(error.value)


def test_rows_are_the_head_s_too(base):
    adapter = made(base, target_modules=["q_proj"], trainable_token_indices=[5, 2])
    rows = table_of(adapter)["embedding_lora_tokens"] + 1.0
    adapter = combine(adapter, {"model": {"embed_tokens": {"embedding_lora_tokens": rows}}})
    merged = merge_adapter(base, adapter, layouts=LAYOUTS)
    assert "lm_head" not in merged
    same(apply(base, adapter), compiled.apply(MODEL, merged, IDS))


def test_combined_and_resized_they_reach_what_they_did(base):
    pairs = {tied: (made(base, ensure_weight_tying=tied), config(ensure_weight_tying=tied))
             for tied in (True, False)}  # fmt: skip
    for tied, (adapter, own) in pairs.items():
        twice, made_of = weighted_adapter([(adapter, own)] * 2, [0.5, 0.5], "cat", layouts=LAYOUTS)
        assert made_of.ensure_weight_tying is tied
        larger, _ = resize_adapter(adapter, own, 4)
        for other in (twice, larger):
            same(apply(base, other), np.asarray(apply(base, adapter)))
    with pytest.raises(InputError, match="some adapters of the embedding act on the head"):
        weighted_adapter(list(pairs.values()), [1, 1], "cat", layouts=LAYOUTS)


def test_of_two_checkpoints_only_a_tied_adapter_is_made(base):
    tuned = jax.tree.map(lambda x: x + 1.0, base)
    found = extract_adapter(base, tuned, config(ensure_weight_tying=True), layouts=LAYOUTS)
    assert "embedding_lora_tied" in table_of(found)
    with pytest.raises(InputError, match="set ensure_weight_tying: true, since without it"):
        extract_adapter(base, tuned, config(), layouts=LAYOUTS)


CASES = {
    "look-up": {},
    "tied": {"ensure_weight_tying": True, "target_modules": ["lm_head", "q_proj"]},
    "dora": {"use_dora": True},
    "whole": {
        "ensure_weight_tying": True,
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj"],
    },
    "rows": {"trainable_token_indices": [5, 2], "target_modules": ["q_proj"]},
    "rows by name": {
        "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]},
        "target_modules": ["q_proj"],
    },
}


@pytest.mark.parametrize("fields", CASES.values(), ids=list(CASES))
def test_saved_and_loaded(base, tmp_path, fields):
    adapter = made(base, **fields)
    save_adapter(tmp_path / "a", adapter, config(**fields), layouts=LAYOUTS)
    loaded, read = load_adapter(tmp_path / "a", base, layouts=LAYOUTS)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True)
    assert all((x == y).all() and x.dtype == y.dtype for x, y in pairs)
    save_adapter(tmp_path / "b", loaded, read, layouts=LAYOUTS)
    one, other = (load_file(tmp_path / x / WEIGHTS) for x in "ab")
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert "lm_head" not in [x.module for x in delta_spectra(tmp_path / "a")]


def edited(directory, **tensors):
    path = directory / WEIGHTS
    save_file(load_file(path) | {PREFIX + key: value for key, value in tensors.items()}, path)


HEAD_A, HEAD_COPY = "lm_head.lora_A.weight", "lm_head.base_layer.weight"


def test_a_file_whose_head_is_another(base, tmp_path):
    tied = {"ensure_weight_tying": True}
    save_adapter(tmp_path / "a", made(base, **tied), config(**tied), layouts=LAYOUTS)
    edited(tmp_path / "a", **{HEAD_COPY: np.array(table_of(base)["embedding"])})
    load_adapter(tmp_path / "a", base, layouts=LAYOUTS)
    untied = combine(base, {"lm_head": {"kernel": jnp.ones((32, 24))}})
    with pytest.raises(InputError, match="not this base's"):
        load_adapter(tmp_path / "a", untied, layouts=LAYOUTS)
    edited(tmp_path / "a", **{HEAD_A: np.ones((2, 32), np.float32)})
    with pytest.raises(InputError, match="lm_head.lora_A.weight is not what the embedding has"):
        load_adapter(tmp_path / "a", base, layouts=LAYOUTS)
    save_adapter(tmp_path / "b", made(base), config(), layouts=LAYOUTS)
    edited(tmp_path / "b", **{HEAD_A: np.ones((2, 32), np.float32)})
    with pytest.raises(InputError, match="no place for .*lm_head.lora_A.weight; it adapts"):
        load_adapter(tmp_path / "b", base, layouts=LAYOUTS)


def test_a_start_that_moves_an_embedding_has_no_file(base, tmp_path):
    """PEFT moves none: it would read ours as another adapter, and we theirs."""
    fields = {"init_lora_weights": "pissa", "ensure_weight_tying": True}
    _, adapter = init_with_base(KEY, base, config(**fields), layouts=LAYOUTS)
    with pytest.raises(InputError, match="moves no embedding in PEFT; make the adapter plain"):
        save_adapter(tmp_path / "a", adapter, config(**fields), layouts=LAYOUTS)
    save_adapter(tmp_path / "a", made(base), config(), layouts=LAYOUTS)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match="lm_head.lora_A|moves no embedding"):
        load_adapter(tmp_path / "a", base, layouts=LAYOUTS)
    with pytest.raises(InputError, match="would move model/embed_tokens/embedding under"):
        init_with_base(KEY, base, config(init_lora_weights="pissa"), layouts=LAYOUTS)
