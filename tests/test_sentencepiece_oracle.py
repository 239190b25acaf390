"""SentencePiece's model files, as the sentencepiece package and transformers read them."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_jax._tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

CORPUS = [
    f"{who} {did} {what}, and then {what} {did} {who}: 'It was 1{n}7!'"
    for n, who in enumerate(["The cat", "A girl named Lily", "Nobody here", "MY UNCLE", "you"])
    for did in ["sat on", "asked for", "quickly forgot", "jumps over", "explains"]
    for what in ["the mat", "zebra x-rays", "two cakes", "king's view", "a bowl of soup"]
] + ["你好，世界。今天天气很好。", "繁體中文：請問圖書館在哪裡？"] * 4
TEXTS = [
    *CORPUS[::25],
    "The cat sat on the mat.  It was happy!\n\n\tVery happy.",
    "今天，请问世界在哪裡？",
    "👩‍👩‍👧‍👦 and 👍🏽, 🇩🇪!",
    "مرحبا بالعالم",
    "שלום עולם",
    " leading,  two  spaces and a tail  ",
    "",
    "  ",
    "a<tool>b <tool>",
    "ﬁne ｆｕｌｌ",
    "<0x0A>",
    "aaaaaaaa ababababa",
]
KINDS = {
    "llama": {"model_type": "bpe", "byte_fallback": True},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
    "no bytes": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "normalized": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "trimmed": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": True},
}
USUAL = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
Train = Callable[[str], tuple[Path, bytes]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A directory with a `tokenizer.model` alone, and the model."""
    made: dict[str, tuple[Path, bytes]] = {}

    def trained(kind: str) -> tuple[Path, bytes]:
        if kind not in made:
            out, options = io.BytesIO(), {**USUAL, **KINDS[kind]}
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS),
                model_writer=out,
                vocab_size=420,
                hard_vocab_limit=False,
                user_defined_symbols=["<tool>"],
                minloglevel=2,
                **options,
            )
            directory = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            (directory / "tokenizer.model").write_bytes(out.getvalue())
            made[kind] = directory, out.getvalue()
        return made[kind]

    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_sentencepiece(train: Train, kind: str) -> None:
    directory, data = train(kind)
    theirs = spm.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_directory(directory)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert ours.vocab_size == theirs.vocab_size()
    for text in TEXTS:
        if (kind == "trimmed" and "<tool>" in text) or (kind == "unigram" and "<0x" in text):
            continue  # A mark ends what is trimmed; unknown letters may make a byte.
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        if 0 not in ids:  # sentencepiece writes a mark of its own for the unknown.
            assert ours.decode(ids) == theirs.decode(ids)


def test_cut_off_characters_decode_as_in_sentencepiece(train: Train) -> None:
    directory, data = train("llama")
    theirs = spm.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_directory(directory)
    ids = ours.encode("日本語 👍")
    for end in range(len(ids) + 1):
        for start in range(end):
            assert ours.decode([*ids[:start], *ids[end:]]) == theirs.decode(
                [*ids[:start], *ids[end:]]
            )


@pytest.mark.parametrize("legacy", [True, False])
def test_same_as_llama_in_transformers(train: Train, legacy: bool) -> None:
    directory, _ = train("llama")
    theirs = transformers.LlamaTokenizer.from_pretrained(directory, legacy=legacy)
    (directory / "tokenizer_config.json").write_text(f'{{"legacy": {str(legacy).lower()}}}')
    ours = Tokenizer.from_directory(directory)
    for text in [*TEXTS, "<s>[INST] the mat [/INST] Lily</s><s>[INST]again"]:
        if not text.startswith(" "):  # Theirs loses a space there, sentencepiece does not.
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_same_as_gemma_in_transformers(train: Train) -> None:
    directory, _ = train("gemma")
    theirs = transformers.GemmaTokenizer.from_pretrained(
        directory, bos_token="<s>", eos_token="</s>", pad_token="<s>", mask_token=None
    )
    ours = Tokenizer.from_directory(directory)
    for text in [*TEXTS, "<s>user\nthe mat</s>\n<s>model\n"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
