"""The tokenizer as Hugging Face directories spell it."""

import json
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from lora_jax._errors import InputError
from lora_jax._tokenizer import Tokenizer

MARKS = ["<s>", "</s>", "<pad>"]


@pytest.fixture(scope="module")
def backend_json() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world", "hello there"], trainer)
    return backend.to_str()


@pytest.fixture
def directory(tmp_path: Path, backend_json: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(backend_json)
    return tmp_path


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("text", ["hello world", "a\n\n  b ", "Grüße 🌍", "hello</s>"])
def test_round_trip(directory: Path, text: str) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, special=True) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_decode_leaves_marks_out(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode("<s>hello</s>")
    assert ids[0] == 0 and ids[-1] == 1
    assert tokenizer.decode(ids) == "hello"


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_token_spellings(directory: Path, file: str, eos: object) -> None:
    write(directory / file, {"bos_token": "<s>", "eos_token": eos, "pad_token": None})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_ids_of_generation_config(directory: Path) -> None:
    write(directory / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 0})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, (1, 2))
    assert tokenizer.special_tokens["eos_token"] == "</s>"


def test_null_in_the_config_leaves_the_map_its_say(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"eos_token": None})
    write(directory / "special_tokens_map.json", {"eos_token": "</s>"})
    assert Tokenizer.from_directory(directory).eos_id == 1


def test_a_bos_that_no_file_of_the_tokenizer_names_stays_out_of_templates(directory: Path) -> None:
    write(directory / "config.json", {"bos_token_id": 0, "eos_token_id": 1})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.special_tokens) == (0, {"eos_token": "</s>"})


def test_an_end_of_sequence_is_a_mark_even_if_the_file_calls_it_plain(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"yes": 0}, unk_token="yes"))
    backend.add_tokens([AddedToken("</s>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.special_texts, tokenizer.decode([0, 1])) == (("</s>",), "yes")


def test_pad_that_is_not_in_the_vocabulary_is_no_pad(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "[PAD]"})
    assert Tokenizer.from_directory(directory).pad_id is None


def test_vocab_size_counts_added_tokens_and_gaps(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    before = Tokenizer.from_directory(directory).vocab_size
    backend.add_special_tokens([AddedToken("<extra>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    after = Tokenizer.from_directory(directory)
    assert after.vocab_size == before + 1
    assert after.encode("<extra>") == [before]
    assert "<extra>" in after.special_texts


def test_no_tokens_are_added_into_gaps() -> None:
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 9}, unk_token="a")), {})
    with pytest.raises(InputError, match="the vocabulary has gaps"):
        tokenizer.with_tokens(["<tool>"])


@pytest.mark.parametrize("said", [True, False])
def test_add_bos_as_the_config_says(directory: Path, said: bool) -> None:
    write(directory / "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": said})
    assert Tokenizer.from_directory(directory).add_bos is said


def test_add_bos_as_the_post_processor_does(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(directory / "tokenizer.json"))
    write(directory / "tokenizer_config.json", {"bos_token": "<s>"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.add_bos
    assert 0 not in tokenizer.encode("hello")


def test_truncation_of_the_file_is_switched_off(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("hello world there")) == "hello world there"


def test_chat_template_from_config_list_and_file(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    write(config, {"chat_template": "A"})
    assert Tokenizer.from_directory(directory).chat_template == "A"
    write(config, {"chat_template": [{"name": "tool_use", "template": "T"}]})
    assert Tokenizer.from_directory(directory).chat_template is None
    write(config, {"chat_template": [{"name": "default", "template": "D"}]})
    assert Tokenizer.from_directory(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("F")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.chat_template == "F"
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert [file.name for file in tokenizer.files] == names


def test_more_chat_templates(directory: Path) -> None:
    write(directory / "chat_template.json", {"chat_template": "J"})
    assert Tokenizer.from_directory(directory).chat_template == "J"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(directory / "tokenizer_config.json", {"chat_template": named})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("D", "T")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("日本")
    (directory / "chat_template.jinja").write_text("F")
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("F", "日本")


def test_segments_of_a_tokenizer_that_makes_up_spaces(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.normalizer = normalizers.Prepend(" ")
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(directory)
    pieces = ["hello", "world", "\nthere", ""]
    [segments] = tokenizer.encode_segments([pieces])
    assert [tokenizer.decode(ids) for ids in segments] == [" hello", "world", "\nthere", ""]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer; looked for tokenizer\.json, tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", ""])
def test_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(("content", "word"), [("{", "not JSON"), ("[]", "a JSON object")])
def test_broken_config(directory: Path, content: str, word: str) -> None:
    (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=f"tokenizer_config.json: .*{word}"):
        Tokenizer.from_directory(directory)


def test_template_that_is_no_text(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.from_directory(directory)


def test_eos_that_is_not_in_the_vocabulary(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"eos_token": "<end>"})
    with pytest.raises(InputError, match="eos_token is '<end>', which the vocabulary does not"):
        Tokenizer.from_directory(directory)


def test_stories_tokenizer(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_directory(data_dir / "stories260K-hf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert (tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.add_bos) == (512, (1, 2), True)
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Each token has its space, which the first one's was made up.
    assert "".join(map(tokenizer.token_text, ids)) == f" {text}"
    assert tokenizer.token_bytes(tokenizer.token_id("<0xC3>")) == b"\xc3"
    [segments] = tokenizer.encode_segments([["Once upon ", "a time"]])
    assert tokenizer.decode([i for ids in segments for i in ids]) == "Once upon a time"
