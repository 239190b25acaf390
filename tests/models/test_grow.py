"""Models with more tokens than they came with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import InputError, QuantConfig
from lora_jax._tokenizer import Tokenizer
from lora_jax.models import (
    CausalLM,
    abstract_params,
    add_tokens,
    load_pretrained,
    load_without_weights,
    quantize_params,
    save_pretrained,
    vocabulary_tables,
)
from lora_jax.models._config_json import config_from_hf
from lora_jax.models._families import FAMILIES

FEW = ["<tool>", "</tool>", "<|call|>"]


@pytest.fixture(scope="module")
def base(base_dir):
    return load_pretrained(base_dir)


def tables(pretrained) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head, a row for each token."""
    params = pretrained.params
    embedding, head = params["model"]["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    return np.asarray(embedding), np.asarray(head).T


@pytest.mark.parametrize("more", [0, 400])
def test_new_rows_are_the_mean_and_spare_ones_come_first(base, more: int) -> None:
    texts = [*FEW, *(f"<extra_{i}>" for i in range(more))]
    known, spare = base.tokenizer.vocab_size, base.config.vocab_size
    grown = add_tokens(base, texts)
    assert known + len(FEW) < spare
    assert grown.config.vocab_size == (spare if not more else known + len(texts))
    for before, after in zip(tables(base), tables(grown), strict=True):
        assert after.shape == (grown.config.vocab_size, before.shape[1])
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after[:known], before[:known])
        mean = before[:known].mean(axis=0)
        np.testing.assert_allclose(after[known:], mean[None].repeat(len(after) - known, 0), 1e-5)
    ids = grown.tokenizer.encode("one<tool>two</tool>" + texts[-1])
    assert [grown.tokenizer.token_id(text) for text in FEW[:2]] == [known, known + 1]
    assert ids[-1] == known + len(texts) - 1
    logits = grown.module.apply({"params": grown.params}, jnp.asarray([ids]))
    assert logits.shape[-1] == grown.config.vocab_size


def test_the_old_model_stays_as_it_was(base) -> None:
    size = base.tokenizer.vocab_size
    add_tokens(base, FEW)
    assert base.tokenizer.vocab_size == size and base.tokenizer.token_id("<tool>") is None
    assert add_tokens(base, []) is base


def test_shapes_grow_alike(base, base_dir) -> None:
    texts = [f"<t{i}>" for i in range(100)]
    shapes, arrays = add_tokens(load_without_weights(base_dir), texts), add_tokens(base, texts)
    assert jax.tree.map(jnp.shape, shapes.params) == jax.tree.map(jnp.shape, arrays.params)
    assert shapes.config == arrays.config


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_every_family_grows_where_it_counts_tokens(base, model_type: str) -> None:
    small = dict(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=320,
        n_embd=64, n_head=4, n_layer=2, n_positions=320,
    )  # fmt: skip
    config = config_from_hf({"model_type": model_type, **small})
    shapes = abstract_params(config)
    model = dataclasses.replace(base, module=CausalLM(config), params=shapes, config=config)
    grown = add_tokens(model, [f"<t{i}>" for i in range(100)])
    wanted = abstract_params(dataclasses.replace(config, vocab_size=grown.config.vocab_size))
    assert grown.config.vocab_size > 320
    assert jax.tree.map(jnp.shape, grown.params) == jax.tree.map(jnp.shape, wanted)
    assert len(vocabulary_tables(grown)) == 2 - config.tie_word_embeddings


def test_a_shared_head_grows_with_the_embedding(base) -> None:
    tied = dataclasses.replace(base.config, tie_word_embeddings=True)
    params = {"model": base.params["model"]}
    module = base.module.clone(config=tied)
    shared = dataclasses.replace(base, module=module, params=params, config=tied)
    grown = add_tokens(shared, [f"<t{i}>" for i in range(100)])
    assert set(grown.params) == {"model"}
    logits = grown.module.apply({"params": grown.params}, jnp.ones((1, 2), jnp.int32))
    assert logits.shape[-1] == grown.config.vocab_size > base.config.vocab_size


def test_saved_and_read_again(base, tmp_path) -> None:
    grown = add_tokens(base, [*FEW, *(f"<t{i}>" for i in range(90))])
    save_pretrained(
        tmp_path / "m", grown.params, grown.config, dtype="float32", tokenizer=grown.tokenizer
    )
    again = load_pretrained(tmp_path / "m")
    assert again.config.vocab_size == grown.config.vocab_size
    for text in ["one <tool>two</tool>", "three<|call|>", "<t89>"]:
        assert again.tokenizer.encode(text) == grown.tokenizer.encode(text)
    assert again.tokenizer.decode(again.tokenizer.encode("a<tool>b<|call|>")) == "a<tool>b"
    assert (again.tokenizer.eos_id, again.tokenizer.bos_id) == (base.tokenizer.eos_id, 0)
    assert again.tokenizer.added == () and grown.tokenizer.added[:3] == tuple(FEW)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["<tool>", "<tool>"], "'<tool>' is given twice; take it out"),
        (["</s>"], r"'</s>' is a token already \(id 1\)"),
        ([""], "'' cannot be a token"),
        ([" a"], "' a' cannot be a token; give a text without spaces at its ends"),
    ],
)
def test_what_cannot_be_added(base, texts: list[str], says: str) -> None:
    with pytest.raises(InputError, match=f"^model.add_tokens: {says}"):
        add_tokens(base, texts)


def test_no_rows_for_quantized_tables(base) -> None:
    params = quantize_params(base.params, QuantConfig(format="nf4", embedding="int8"))
    with pytest.raises(InputError, match="embed_tokens/embedding is quantized, so no row"):
        add_tokens(dataclasses.replace(base, params=params), FEW)


def test_no_tokenizer(base) -> None:
    with pytest.raises(InputError, match="no tokenizer, so no tokens can be added"):
        add_tokens(dataclasses.replace(base, tokenizer=None), FEW)


def test_a_tokenizer_of_other_files_becomes_tokenizer_json(tmp_path) -> None:
    """Written with everything that its own files told: here SentencePiece's."""
    from tests.test_sentencepiece import bpe_pieces, model

    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("T")
    (tmp_path / "tokenizer.model").write_bytes(model(bpe_pieces()))
    tokenizer = Tokenizer.from_directory(tmp_path)
    out = [tmp_path / "plain", tmp_path / "grown"]
    for directory, saved in zip(out, [tokenizer, tokenizer.with_tokens(FEW)], strict=True):
        directory.mkdir()
        saved.save(directory)
        again = Tokenizer.from_directory(directory)
        for text in ["the 日本<tool> in", "é<s>the", "<|call|>"]:
            assert again.encode(text) == saved.encode(text)
            assert again.decode(again.encode(text)) == saved.decode(saved.encode(text))
        assert (again.bos_id, again.eos_id, again.add_bos) == (1, 2, True)
        assert again.tool_template == "T"
    assert not (out[1] / "tokenizer.model").exists()
