"""A tiny byte-level tokenizer, trained once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora_jax._tokenizer import Tokenizer

MARKS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Below is an instruction. Write a response that carries it out.",
    "### Instruction:\nSay hello.\n\n### Input:\nNothing\n\n### Response:\nHello, world!",
    "the cat sat on the mat, and the dog asked: is 2 + 2 = 4?",
]

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend.to_str()


@pytest.fixture
def make_tokenizer(tmp_path: Path, tokenizer_json: str) -> MakeTokenizer:
    """Write a tokenizer directory with these config entries, and read it."""

    def make(**config: object) -> Tokenizer:
        directory = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        (directory / "tokenizer.json").write_text(tokenizer_json)
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
        config = {name: value for name, value in config.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.from_directory(directory)

    return make


@pytest.fixture
def tokenizer(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer()
