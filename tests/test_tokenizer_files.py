"""A tokenizer's files without `tokenizer.json`: GPT-2's vocabulary and merges, added tokens."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from lora_jax._errors import InputError
from lora_jax._tokenizer import Tokenizer
from lora_jax._tokenizer_files import tokenizer_file

TEXTS = [
    "Hello there, it's 2024!  Two spaces\n\n  and they'll go.",
    "你好，世界。繁體中文：圖書館",
    "👩‍👩‍👧‍👦 👍🏽",
    "مرحبا بالعالم שלום",
    " leading",
    "e\u0301 and é",
    "a<|endoftext|>b",
]


def trained(marks: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=marks,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:1] * 2 + ["hello there the then"], trainer)
    return backend


@pytest.fixture(scope="module")
def backend() -> Backend:
    return trained(["<|endoftext|>"])


@pytest.fixture
def directory(tmp_path: Path, backend: Backend) -> Path:
    backend.model.save(str(tmp_path))
    return tmp_path


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), "utf-8")


def test_vocabulary_and_merges_are_gpt2s(directory: Path, backend: Backend) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, special=True) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 0, False)
    assert tokenizer.special_texts == ("<|endoftext|>",)
    assert {file.name for file in tokenizer.files} == {"vocab.json", "merges.txt"}


def test_qwen_cuts_texts_its_own_way(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    tokenizer = Tokenizer.from_directory(directory)
    for text in TEXTS:
        whole = tokenizer.decode(tokenizer.encode(text), special=True)
        assert whole == normalizers.NFC().normalize_str(text)
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'LL pay 12\n")
    assert [piece for piece, _ in pieces] == ["I", "'LL", "Ġpay", "Ġ", "1", "2", "Ċ"]


@pytest.mark.parametrize(
    "more",
    [
        {"additional_special_tokens": ["<|im_start|>"]},
        {"extra_special_tokens": {"start": {"content": "<|im_start|>"}}},
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens(directory: Path, backend: Backend, file: str, more: dict) -> None:
    size = backend.get_vocab_size()
    marks = {"<|im_start|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}
    config: dict[str, object] = {"eos_token": "<|im_end|>", **more}
    if file == "added_tokens.json":
        write(directory / file, marks)
    else:
        config["added_tokens_decoder"] = {
            str(n): {"content": text, "special": text != "<tool>", "normalized": False}
            for text, n in reversed(marks.items())
        }
    write(directory / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("<|im_start|><tool><|im_end|>") == [size, size + 2, size + 1]
    assert set(tokenizer.special_texts) == {"<|im_start|>", "<|im_end|>"}
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (size + 1, size + 3)
    assert tokenizer.decode(tokenizer.encode("<tool>a<|im_end|>")) == "<tool>a"


@pytest.mark.parametrize("number", [9999, "x"])
def test_added_tokens_whose_ids_cannot_be(directory: Path, number: object) -> None:
    write(directory / "added_tokens.json", {"<tool>": number})
    with pytest.raises(InputError, match=f"added token .*has the id '?{number}"):
        Tokenizer.from_directory(directory)


def test_vocabulary_without_merges(directory: Path) -> None:
    (directory / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges\.txt: not there, but vocab\.json is"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(("file", "text"), [("vocab.json", "{"), ("merges.txt", "#v\nq zz\n")])
def test_broken_vocabulary(directory: Path, file: str, text: str) -> None:
    (directory / file).write_text(text)
    with pytest.raises(InputError, match=r"vocab\.json: no vocabulary to merges\.txt"):
        Tokenizer.from_directory(directory)


def test_a_class_whose_cuts_are_not_known(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})
    with pytest.raises(InputError, match=r"how RobertaTokenizer cuts a text is not known"):
        Tokenizer.from_directory(directory)


def test_tokenizer_json_comes_first(directory: Path, backend: Backend) -> None:
    other = trained(["<s>"])
    other.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_directory(directory).token_id("<s>") == 0
    assert backend.token_to_id("<s>") is None


def test_the_file_of_the_vocabulary(directory: Path) -> None:
    for name in ("vocab.json", "tokenizer.model", "tokenizer.json"):
        (directory / name).touch()
        assert tokenizer_file(directory) == directory / name
    for name in ("vocab.json", "tokenizer.model", "tokenizer.json"):
        (directory / name).unlink()
    assert tokenizer_file(directory) is None
