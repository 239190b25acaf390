"""Text as its tokens come, for every kind of decoder that language models have."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lora_jax._text_stream import TextStream
from lora_jax._tokenizer import Tokenizer

TEXTS = [
    "The cat sat on the mat.  It was happy!\n\n\tVery happy.",
    "你好，世界。今天天气很好。",
    "繁體中文：請問圖書館在哪裡？",
    "👩‍👩‍👧‍👦 and 👍🏽, 🇩🇪 or 🏳️‍🌈!",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם, מה שלומך?",
    " leading,  two  spaces and a tail  ",
    "a � b",
]
MARKS = ["<s>", "</s>"]


def byte_level() -> Backend:
    """GPT-2's kind: a letter for each byte."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:3], trainer)
    return backend


def byte_fallback(strip: bool) -> Backend:
    """Llama 2's kind (a space is made up and taken off) or Gemma's: bytes for what is rare."""
    letters = [*MARKS, *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdefghinotTs你好م"]
    vocabulary = {letter: n for n, letter in enumerate([*letters, "▁t", "th"])}
    backend = Backend(
        models.BPE(vocabulary, [("▁", "t"), ("t", "h")], unk_token="<s>", byte_fallback=True)
    )
    backend.add_special_tokens(MARKS)
    spaces = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *spaces] if strip else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return backend


def metaspace() -> Backend:
    letters = sorted({letter for text in TEXTS for letter in text} - {" "})
    vocabulary = {letter: n for n, letter in enumerate([*MARKS, "▁", *letters])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<s>"))
    backend.add_special_tokens(MARKS)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


KINDS = {
    "byte level": byte_level,
    "byte fallback": functools.partial(byte_fallback, strip=False),
    "byte fallback, space made up": functools.partial(byte_fallback, strip=True),
    "metaspace": metaspace,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), {}, bos_id=0, eos_id=1)


def streamed(tokenizer: Tokenizer, ids: list[int], *, special: bool = False) -> list[str]:
    stream = TextStream(tokenizer, special=special)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_round_trip_and_stream_whole(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    if kind == "metaspace":  # It makes up no space before a text that begins with one.
        text = text.removeprefix(" ")
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text == tokenizer.decode(tokenizer.encode(text))
    assert "�" in text or not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("kind", list(KINDS)[:3])
@given(text=st.text())
@settings(max_examples=50)
def test_any_text_streams_whole(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).count("�") == text.count("�")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=100)
def test_any_tokens_stream_as_they_decode(kind: str, special: bool, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    pieces = streamed(tokenizer, ids, special=special)
    assert "".join(pieces) == tokenizer.decode(ids, special=special)


@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_a_character_comes_with_its_last_byte(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("🌍")
    assert len(ids) >= 4 and streamed(tokenizer, ids)[-2:] == ["🌍", ""]


def test_a_cut_off_character_does_not_take_the_text_before_with_it() -> None:
    tokenizer = tokenizer_of("byte fallback")
    ids = tokenizer.encode("日本語")[:-1]
    assert tokenizer.decode(ids) == "日本��"
    assert streamed(tokenizer, ids)[-1] == "��"


def test_a_stream_keeps_few_tokens() -> None:
    tokenizer = tokenizer_of("byte fallback, space made up")
    stream = TextStream(tokenizer)
    for token_id in tokenizer.encode("one 日本 two " * 50):
        stream.push(token_id)
        assert len(stream._ids) <= 8


def test_a_finished_stream_starts_afresh() -> None:
    tokenizer = tokenizer_of("byte fallback, space made up")
    stream = TextStream(tokenizer)
    for _ in range(2):
        pieces = [stream.push(token_id) for token_id in tokenizer.encode("the end")]
        assert "".join([*pieces, stream.finish()]) == "the end"
