"""GPT-2's and Qwen's vocabulary files, as transformers reads them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from lora_jax._tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TEXTS = [
    "Hello there, it's 2024!  Two spaces\n\n  and THEY'LL go.\r\n",
    "你好，世界。繁體中文：圖書館  ",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "مرحبا بالعالم שלום",
    " leading\ttab",
    "e\u0301 and é, x\u00a0y",
    "<|im_start|>user\nhi<|im_end|> <tool>call</tool><|endoftext|>",
]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_same_as_transformers(tmp_path: Path, kind: str) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.model.save(str(tmp_path))
    marks = ["<|im_start|>", "<|im_end|>", "<tool>"]
    added = {
        str(n): {"content": text, "special": text[1] == "|", "normalized": False}
        for n, text in enumerate(marks, backend.get_vocab_size())
    }
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": kind, **names, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    wanted = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == wanted
