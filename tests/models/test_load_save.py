"""Directories in and out: round trips, layouts of files, and every kind of bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from lora_jax import QuantConfig, lora_linen
from lora_jax._errors import InputError
from lora_jax._names import hf_keys
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.models import CausalLM, abstract_params, load_pretrained, save_pretrained
from lora_jax.models._config_json import config_from_hf, config_to_hf
from lora_jax.quant import QuantizedTensor, dequantize, quantize

BIASED = dict(attention_bias=True, mlp_bias=True)


def assert_equal_trees(got, expected):
    got, expected = dict(leaves_with_path(got)), dict(leaves_with_path(expected))
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    "changes, dtype",
    [
        ({}, "float32"),
        (BIASED, "bfloat16"),
        (dict(tie_word_embeddings=True, head_dim=10), "float16"),
    ],
    ids=str,
)
def test_round_trip_is_exact(tmp_path, config, random_params, changes, dtype):
    config = dataclasses.replace(config, **changes)
    params = random_params(config, 1, dtype)
    save_pretrained(tmp_path / "m", params, config, dtype=dtype)
    pretrained = load_pretrained(tmp_path / "m")
    assert_equal_trees(pretrained.params, params)
    assert pretrained.config == config
    assert pretrained.tokenizer is None
    assert pretrained.stacked == ("model/layers",)
    assert pretrained.module == CausalLM(config, dtype=jnp.dtype("float32"))


def test_shards_hold_the_same(tmp_path, config, params):
    save_pretrained(tmp_path / "m", params, config, dtype="float32", max_shard_bytes=40_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(
        sum(x.nbytes for x in load_file(tmp_path / "m" / name).values()) <= 40_000 for name in files
    )
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_equal_trees(load_pretrained(tmp_path / "m").params, params)


def test_param_dtype_and_dtype(model_dir):
    types = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    pretrained = load_pretrained(model_dir, **types, remat="nothing")
    assert {x.dtype for x in jax.tree.leaves(pretrained.params)} == {jnp.dtype("bfloat16")}
    assert (pretrained.module.dtype, pretrained.module.remat) == (jnp.bfloat16, "nothing")


def test_quantized_while_read(tmp_path, model_dir, config, params):
    """Blocks' kernels equal the whole stack quantized at once; the rest stays as it is."""
    got = load_pretrained(model_dir, quant=QuantConfig()).params
    for path, leaf in leaves_with_path(params):
        node = dict(leaves_with_path(got))[path]
        if "layers" in path and path.endswith("kernel"):
            expected = quantize(leaf, QuantConfig(), stacked=1)
            assert isinstance(node, QuantizedTensor)
            assert jax.tree.structure(node) == jax.tree.structure(expected)
            # Compiled and not, a scale may differ in its last bit.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), node, expected)
        else:
            np.testing.assert_array_equal(node, leaf)
    assert jax.tree.structure(abstract_params(config, quant=QuantConfig())) == (
        jax.tree.structure(got)
    )

    save_pretrained(tmp_path / "dense", got, config, dtype="float32")
    dense = load_pretrained(tmp_path / "dense").params["model"]["layers"]["mlp"]["down_proj"]
    quantized = got["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(dense["kernel"], dequantize(quantized, jnp.float32), rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_quantized_on_request(tmp_path, config, random_params, tied):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    params = random_params(config, 1, "float32")
    save_pretrained(tmp_path / "m", params, config, dtype="float32")
    quant = QuantConfig(embedding="int8", head="nf4")
    pretrained = load_pretrained(tmp_path / "m", quant=quant)
    table = pretrained.params["model"]["embed_tokens"]["embedding"]
    assert (table.format, table.contracting, table.zeros) == ("int8", (1,), None)
    shapes = abstract_params(config, quant=quant)
    assert jax.tree.structure(shapes) == jax.tree.structure(pretrained.params)

    def dense(_, leaf):
        return leaf.unbox() if isinstance(leaf, QuantizedTensor) else leaf

    ids = jnp.arange(24).reshape(2, 12) % config.vocab_size
    apply = jax.jit(lora_linen(pretrained.module).apply)
    got = apply({"params": pretrained.params}, ids)
    expected = apply({"params": map_with_path(dense, pretrained.params)}, ids)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    if not tied:
        assert pretrained.params["lm_head"]["kernel"].format == "nf4"


@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, model_dir, part):
    def spoil(tensors):
        tensors[part][3, 5] = np.nan
        return tensors

    edit_tensors(model_dir, spoil)
    with pytest.raises(InputError, match=f"{part} holds weights that are not finite"):
        load_pretrained(model_dir, quant=QuantConfig(head="int4"))


def test_names_are_distinct_and_cover_all_layers(config):
    shapes = dict(leaves_with_path(abstract_params(dataclasses.replace(config, **BIASED))))
    keys = [key for path in shapes for key in hf_keys(path, ("model/layers",), 2)]
    assert len(set(keys)) == len(keys) == 2 * (7 * 2 + 2) + 3
    assert "model.layers.1.self_attn.q_proj.bias" in keys


def test_names_without_their_prefix_and_old_buffers(model_dir, params):
    def rename(tensors):
        tensors = {k.removeprefix("model."): x for k, x in tensors.items()}
        return tensors | {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}

    edit_tensors(model_dir, rename)
    assert_equal_trees(load_pretrained(model_dir).params, params)


def test_tied_head_in_the_file(tmp_path, tied, random_params):
    params = random_params(tied)
    save_pretrained(tmp_path / "m", params, tied, dtype="float32")
    embedding = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "m", lambda t: t | {"lm_head.weight": t[embedding]})
    assert_equal_trees(load_pretrained(tmp_path / "m").params, params)
    edit_tensors(tmp_path / "m", lambda t: t | {"lm_head.weight": t[embedding] + 1})
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
        load_pretrained(tmp_path / "m")


def test_end_of_text_comes_from_generation_config(model_dir):
    edit_json(model_dir / "generation_config.json", eos_token_id=[1, 2])
    assert load_pretrained(model_dir).config.eos_token_ids == (1, 2)
    (model_dir / "generation_config.json").unlink()
    assert load_pretrained(model_dir).config.eos_token_ids == (2, 3)


def test_config_of_transformers_4_and_5(config):
    ours = config_to_hf(dataclasses.replace(config, rope_theta=5e5), "float32")
    four = {k: v for k, v in ours.items() if k != "rope_parameters"}
    five = {k: v for k, v in ours.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    five |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"}
    assert config_from_hf(four) == config_from_hf(five) == config_from_hf(ours)
    assert config_from_hf(four).rope_theta == 5e5


# Bad input: (what was done to the directory, what the one line says).


def no_config(directory):
    (directory / "config.json").unlink()


def broken_json(directory):
    (directory / "config.json").write_text('{"model_type": ')


def json_list(directory):
    (directory / "config.json").write_text("[]")


def other_model(directory):
    edit_json(directory / "config.json", model_type="lama")


def no_vocab(directory):
    edit_json(directory / "config.json", vocab_size=None)


def odd_rope(directory):
    edit_json(directory / "config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0})


def rope_in_words(directory):
    edit_json(directory / "config.json", rope_parameters="default")


def heads_in_words(directory):
    edit_json(directory / "config.json", num_key_value_heads="2")


def negative_heads(directory):
    edit_json(directory / "config.json", num_key_value_heads=-2)


def negative_eps(directory):
    edit_json(directory / "config.json", rms_norm_eps=-1)


def eos_in_words(directory):
    edit_json(directory / "generation_config.json", eos_token_id="2")


def a_billion_layers(directory):
    edit_json(directory / "config.json", num_hidden_layers=10**9)


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def only_a_pickle(directory):
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(directory):
    (directory / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)


def missing_tensor(directory):
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(directory, lambda t: {k: x for k, x in t.items() if k != key})


def unexpected_tensor(directory):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}
    edit_tensors(directory, lambda t: t | extra)


def wrong_shape(directory):
    edit_json(directory / "config.json", vocab_size=47)


def wrong_type(directory):
    norm = "model.norm.weight"
    edit_tensors(directory, lambda t: t | {norm: t[norm].astype(np.int8)})


def escaping_index(directory):
    (directory / "model.safetensors").rename(directory.parent / "out.safetensors")
    index = {"weight_map": {"model.norm.weight": "../out.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_absent_shard(directory):
    no_weights(directory)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(directory):
    no_weights(directory)
    (directory / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_config, r"config\.json: no such file"),
        (broken_json, r"config\.json: not valid JSON \(.*line 1 column 16"),
        (json_list, r"config\.json: expected a JSON object, got list"),
        (other_model, r"model_type 'lama' is not supported \(did you mean 'llama'\?\)"),
        (no_vocab, r"config\.json: missing vocab_size"),
        (odd_rope, r"rope type 'spiral' is not supported; known: 'default', 'linear'"),
        (rope_in_words, r"config\.json: rope_parameters must be an object, got 'default'"),
        (heads_in_words, r"config\.json: num_key_value_heads must be of type int, got '2'"),
        (negative_heads, r"config\.json: num_key_value_heads must be above 0, got -2"),
        (negative_eps, r"config\.json: rms_norm_eps must be above 0, got -1"),
        (eos_in_words, r"generation_config\.json: eos_token_id must be a token id or a list"),
        (a_billion_layers, r"num_hidden_layers is 1000000000, but the weights are 21 tensors"),
        (no_weights, r"model: no weights; save the model as safetensors"),
        (only_a_pickle, r"only pytorch_model\.bin, a pickle, which is never opened"),
        (truncated, r"model\.safetensors: not a whole safetensors file"),
        (not_safetensors, r"model\.safetensors: not a whole safetensors file"),
        (missing_tensor, r"1 of 21 tensors are missing, .* model\.layers\.1\.mlp\.up_proj\.weight"),
        (unexpected_tensor, r"1 unexpected tensors, .* model\.layers\.0\.self_attn\.q_proj\.bias"),
        (wrong_shape, r"weight has shape \(48, 64\), .* implies \(47, 64\)"),
        (wrong_type, r"model\.norm\.weight has type I8"),
        (escaping_index, r"'\.\./out\.safetensors' is not the name of a file in this directory"),
        (index_of_absent_shard, r"model-00001-of-00002\.safetensors: no such file"),
        (empty_index, r"weight_map is missing or empty"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_directories_get_one_line(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(InputError, match=message) as caught:
        load_pretrained(model_dir)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model(model_dir):
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(49)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(model_dir / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.json: 49 tokens, but the model knows 48"):
        load_pretrained(model_dir)


def test_no_such_directory(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such directory"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("options", [dict(dtype="fp16"), dict(param_dtype="int8")], ids=str)
def test_unknown_types_are_refused(model_dir, options):
    with pytest.raises(InputError, match="is not supported; use float32, bfloat16, float16"):
        load_pretrained(model_dir, **options)


def test_a_tree_that_does_not_fit_is_not_saved(tmp_path, config, params):
    def save(tree):
        save_pretrained(tmp_path / "m", tree, config, dtype="float32")

    with pytest.raises(InputError, match="unexpected leaf lm_head/lora_A.*merge"):
        save(params | {"lm_head": params["lm_head"] | {"lora_A": jnp.ones(2)}})
    with pytest.raises(InputError, match="lm_head/kernel is missing"):
        save({"model": params["model"]})
    with pytest.raises(InputError, match=r"lm_head/kernel has shape \(2,\), .* \(64, 48\)"):
        save(params | {"lm_head": {"kernel": jnp.ones(2)}})
    assert not list(tmp_path.iterdir())


def test_a_weight_too_large_for_its_type_is_not_saved(tmp_path, config, params):
    large = jax.tree.map(lambda x: x * 1e6, params)
    with pytest.raises(InputError, match="not finite in float16; save as bfloat16 or float32"):
        save_pretrained(tmp_path / "m", large, config, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(model_dir, config, params):
    with pytest.raises(InputError, match="exists already"):
        save_pretrained(model_dir, params, config, dtype="float32")


def test_failure_while_writing_leaves_nothing(tmp_path, config, params):
    class Broken:
        def save(self, directory):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cannot write"):
        save_pretrained(tmp_path / "m", params, config, dtype="float32", tokenizer=Broken())
    assert not list(tmp_path.iterdir())
