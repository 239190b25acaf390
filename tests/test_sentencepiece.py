"""SentencePiece's model files, written here field by field."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax._errors import InputError
from lora_jax._sentencepiece import read_sentencepiece
from lora_jax._tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE, WORD = 1, 2, 3
SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{n:02X}>", 0.0, BYTE) for n in range(256)]
# The pieces of BPE, in the order of their merges; a score is minus the place, as in Llama 2.
WORDS = ["▁t", "he", "▁the", "in", "▁" * 2, "th"]
LETTERS = [*"▁thecainsou.,日本"]


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    result = []
    while number >= 0x80:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(
    pieces: list[tuple[str, float, int]],
    kind: int = BPE,
    byte_fallback: bool = True,
    prefix: bool = True,
    **trainer: int,
) -> bytes:
    message = b"".join(
        field(1, field(1, text) + field(2, score) + field(3, part)) for text, score, part in pieces
    )
    message += field(2, field(3, kind) + field(35, int(byte_fallback)) + field(43, -1))
    return message + field(3, field(1, "identity") + field(3, int(prefix)) + field(4, 0))


def bpe_pieces(*marks: tuple[str, float, int]) -> list[tuple[str, float, int]]:
    words = [(text, float(-n), NORMAL) for n, text in enumerate([*WORDS, *LETTERS])]
    return [*SPECIAL, *marks, *BYTES, *words]


def read(directory: Path, data: bytes, **config: object) -> Tokenizer:
    (directory / "tokenizer.model").write_bytes(data)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(directory)


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_a_directory_with_a_model_alone(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, model(bpe_pieces()))
    assert tokens(tokenizer, "the cat") == ["▁the", "▁", "c", "a", "t"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    assert tokenizer.add_bos and tokenizer.stop_ids == (2,)
    assert tokenizer.encode("</s>") == [2] and tokenizer.decode([1, *tokenizer.encode("a")]) == "a"
    names = ["tokenizer_config.json", "tokenizer.model"]
    assert [file.name for file in tokenizer.files] == names


def test_what_has_no_piece_is_spelled_in_bytes(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, model(bpe_pieces()))
    assert tokens(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    without = read(tmp_path, model([p for p in bpe_pieces() if p[2] != BYTE], byte_fallback=False))
    assert tokens(without, "éé") == ["▁", "<unk>"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["the", " the", "  the ", "", " ", "▁the", "日本 😀\n\tהנה مرحبا"])
def test_spaces_come_back(tmp_path: Path, text: str, prefix: bool) -> None:
    tokenizer = read(tmp_path, model(bpe_pieces(), prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_a_space_at_the_beginning_is_another_one(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, model(bpe_pieces()))
    assert tokens(tokenizer, " in") == ["▁▁", "in"] and tokens(tokenizer, "in") == ["▁", "in"]
    [segments] = tokenizer.encode_segments([[" in", " in", "in"]])
    pieces = [[tokenizer.backend.id_to_token(i) for i in ids] for ids in segments]
    assert pieces == [["▁▁", "in"], ["▁", "in"], ["in"]]


@pytest.mark.parametrize(("legacy", "after"), [(True, ["▁the"]), (False, ["th", "e"])])
def test_a_space_after_a_mark_only_in_legacy_files(
    tmp_path: Path, legacy: bool, after: list[str]
) -> None:
    pieces = [p for p in bpe_pieces() if p[0] != "he"]
    tokenizer = read(tmp_path, model(pieces), legacy=legacy)
    if legacy:
        after = ["▁t", "h", "e"]
    assert tokens(tokenizer, "<s>the")[1:] == after


def test_user_defined_pieces_are_text_and_never_cut(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, model(bpe_pieces(("<tool>", 0.0, USER_DEFINED))))
    assert tokens(tokenizer, "a<tool>in") == ["▁", "a", "<tool>", "in"]
    assert tokenizer.decode(tokenizer.encode("a<tool>in")) == "a<tool>in"
    assert "<tool>" not in tokenizer.special_texts


def test_unigram_takes_the_likeliest_pieces(tmp_path: Path) -> None:
    scores = {"▁": -2.0, "t": -3.0, "h": -3.0, "e": -3.0, "▁the": -6.0, "▁t": -2.5, "he": -3.4}
    pieces = [(text, score, NORMAL) for text, score in scores.items()]
    data = model([*SPECIAL, *BYTES, *pieces], UNIGRAM)
    tokenizer = read(tmp_path, data)
    assert tokens(tokenizer, "the") == ["▁t", "he"]
    assert tokens(tokenizer, "né")[1:] == ["<0x6E>", "<0xC3>", "<0xA9>"]


def test_unigram_reads_no_byte_out_of_the_letters_of_its_name(tmp_path: Path) -> None:
    pieces = [(letter, -9.0, NORMAL) for letter in "▁<0x41>"]
    tokenizer = read(tmp_path, model([*SPECIAL, *BYTES, *pieces], UNIGRAM))
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_a_config_says_otherwise(tmp_path: Path) -> None:
    added = {str(len(bpe_pieces())): {"content": "<|end|>", "special": True, "rstrip": True}}
    tokenizer = read(
        tmp_path,
        model(bpe_pieces()),
        add_bos_token=False,
        add_prefix_space=False,
        eos_token="<|end|>",
        added_tokens_decoder=added,
    )
    assert not tokenizer.add_bos
    assert tokens(tokenizer, "the<|end|>  in") == ["t", "he", "<|end|>", "in"]
    assert tokenizer.eos_id == len(bpe_pieces())


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"IQ== 0\nIg== 1\n", model(bpe_pieces())[:40], field(1, field(2, "x"))],
)
def test_what_is_no_model(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model; give"):
        read(tmp_path, data)


def test_other_kinds_of_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kind word that is not read here"):
        read(tmp_path, model(bpe_pieces(), WORD))


@given(data=st.binary() | st.just(model(bpe_pieces()[:20])).flatmap(lambda m: st.builds(
    lambda at, byte: m[:at] + bytes([byte]) + m[at + 1 :],
    st.integers(0, len(m) - 1), st.integers(0, 255),
)))  # fmt: skip
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.model"
    file.write_bytes(data)
    try:
        assert read_sentencepiece(file).pieces
    except InputError as error:
        assert "\n" not in str(error)
