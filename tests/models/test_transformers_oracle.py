"""The same logits and the same text as transformers, in both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import generate, load_pretrained, save_pretrained
from tests.models import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

SHAPES = {
    "grouped": dict(num_key_value_heads=2),
    "biased": dict(attention_bias=True, mlp_bias=True, rope_theta=5e5, num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True, num_hidden_layers=3),
    "stretched": dict(
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=100.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),  # fmt: skip
    "wide_heads": dict(head_dim=16, num_key_value_heads=2, rms_norm_eps=1e-5),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32]]


def reference(name, dtype="float32"):
    """A random model made by transformers, its weights large enough for uneven logits."""
    torch.manual_seed(len(name))
    options = dict(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    config = transformers.LlamaConfig(**(options | SHAPES[name]))
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in (
        p for n, p in model.named_parameters() if n.endswith(("bias", "norm.weight"))
    ):
        torch.nn.init.normal_(parameter.data, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.to(getattr(torch, dtype))


def saved(model, directory, **options):
    model.save_pretrained(directory, **options)
    return directory


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def assert_same_logits(pretrained, model):
    ids = np.random.default_rng(0).integers(0, 80, (2, 24))
    expected = logits_of(model, ids)
    got = jax.jit(pretrained.module.apply)({"params": pretrained.params}, jnp.asarray(ids))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_their_models(tmp_path, name, dtype):
    pretrained = load_pretrained(saved(reference(name, dtype), tmp_path))
    assert {str(x.dtype) for x in jax.tree.leaves(pretrained.params)} == {dtype}
    # Read anew: casting a model to bfloat16 and back rounds its rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert_same_logits(pretrained, model)


def test_logits_of_their_shards(tmp_path):
    model = reference("grouped")
    pretrained = load_pretrained(saved(model, tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(pretrained, model)


def test_logits_with_a_config_of_transformers_4(tmp_path):
    """Version 5 writes `rope_parameters` and `dtype`; 4 wrote what stands here."""
    model = reference("biased")
    config = json.loads((saved(model, tmp_path) / "config.json").read_text())
    assert "rope_parameters" in config and "rope_theta" not in config
    theta = config.pop("rope_parameters")["rope_theta"]
    four = {"rope_theta": theta, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config | four))
    assert_same_logits(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", SHAPES)
def test_they_load_what_we_save(tmp_path, name):
    pretrained = load_pretrained(saved(reference(name), tmp_path / "theirs"))
    out = tmp_path / "ours"
    shard = 20_000 if name == "grouped" else 5e9
    save_pretrained(
        out, pretrained.params, pretrained.config, dtype="float32", max_shard_bytes=shard
    )
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.rope_parameters["rope_theta"] == pretrained.config.rope_theta
    assert model.dtype == torch.float32
    assert_same_logits(pretrained, model)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_of_a_padded_batch(tmp_path, name):
    """48 tokens a row, token for token up to where their two best logits nearly tie."""
    model = reference(name)
    pretrained = load_pretrained(saved(model, tmp_path))
    got = generate(pretrained.module, pretrained.params, PROMPTS, max_new_tokens=48)
    compared = families.same_as_their_greedy(model, PROMPTS, got)
    assert compared > 0.8 * 48 * len(PROMPTS)


def test_stories260k(data_dir):
    """A real pretrained model; the logits were computed by transformers elsewhere."""
    pretrained = load_pretrained(data_dir / "stories260K-hf")
    run = jax.jit(pretrained.module.apply)
    references = sorted((data_dir / "peft_made").glob("stories260K-hf__*/reference.npz"))
    assert references
    for file in references:
        data = np.load(file)
        got = run({"params": pretrained.params}, jnp.asarray(data["input_ids"], jnp.int32))
        expected = data["base_logits"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_stories260k_tells_a_story(data_dir, tmp_path):
    pretrained = load_pretrained(data_dir / "stories260K-hf")
    tokenizer, config = pretrained.tokenizer, pretrained.config
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    [text] = generate(
        pretrained.module, pretrained.params, [prompt], max_new_tokens=32,
        eos_ids=config.eos_token_ids,
    )  # fmt: skip
    assert "there was a little girl named Lily" in tokenizer.decode(text)

    save_pretrained(tmp_path / "m", pretrained.params, config, dtype="float32", tokenizer=tokenizer)
    again = load_pretrained(tmp_path / "m")
    assert again.config == config
    assert again.tokenizer.encode("Once upon a time") == prompt[1:]
    assert config.eos_token_ids == (1, 2)
