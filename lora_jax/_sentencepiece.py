"""SentencePiece's model file turned into a tokenizer of the `tokenizers` library."""

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._errors import InputError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """One entry of the vocabulary; `kind` is a word, a control token, a byte, …"""

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class SentencePieces:
    """What a SentencePiece model says.

    Args:
        pieces: The vocabulary; a piece's place is its id.
        kind: 1 for unigram, 2 for BPE.
        byte_fallback: Whether characters without a piece are spelled in bytes.
        special: `bos_token` and its like to their texts, those that the model has.
        charsmap: The rules of Unicode normalization in their compiled form, perhaps empty.
        dummy_prefix: Whether a space is put before a text.
        trims: Whether spaces at both ends are taken off, and those between made one.
    """

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    special: Mapping[str, str]
    charsmap: bytes
    dummy_prefix: bool
    trims: bool


def read_sentencepiece(file: Path) -> SentencePieces:
    """Read a `tokenizer.model`.

    Raises:
        InputError: if it is no SentencePiece model, or one of another kind than BPE and unigram.

    Source: `sentencepiece_model.proto` of SentencePiece, whose numbers of fields these are.
    """
    try:
        fields = _by_number(file.read_bytes())
        trainer = _by_number(_last(fields, 2, b""))
        normalizer = _by_number(_last(fields, 3, b""))
        pieces = tuple(_piece(data) for data in fields.get(1, []))
    except (IndexError, TypeError, ValueError, struct.error):
        pieces, trainer, normalizer = (), {}, {}
    if not pieces:
        raise InputError(
            f"{file}: not a SentencePiece model; give the tokenizer.json of the same model"
        )
    kind = _last(trainer, 3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE) or _last(trainer, 24, 0) or not _last(normalizer, 5, 1):
        raise InputError(
            f"{file}: a SentencePiece model of kind {_KINDS.get(kind, kind)} that is not read here"
            " (only BPE and unigram with spaces before words); give a tokenizer.json"
        )
    places = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2)}
    ids = {name: _signed(_last(trainer, *place)) for name, place in places.items()}
    ids["pad_token"] = _signed(_last(trainer, 43, -1))
    return SentencePieces(
        pieces=pieces,
        kind=kind,
        byte_fallback=bool(_last(trainer, 35, 0)),
        special={name: pieces[i].text for name, i in ids.items() if 0 <= i < len(pieces)},
        charsmap=_last(normalizer, 2, b""),
        dummy_prefix=bool(_last(normalizer, 3, 1)),
        trims=bool(_last(normalizer, 4, 1)),
    )


def to_backend(model: SentencePieces, *, prefix: bool, every_stretch: bool) -> Any:
    """The same tokenizer as a `tokenizers.Tokenizer`, without a post-processor.

    Args:
        model: What `read_sentencepiece` gave.
        prefix: Whether a space is put before a text (the model's own word: `dummy_prefix`).
        every_stretch: Whether also before each stretch of text between two marks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import Metaspace

    backend = Tokenizer(_bpe(model, models) if model.kind == _BPE else _unigram(model, models))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trims:
        # A space that a text begins with becomes the one that is put before it.
        for spaces, one in (("^ +", " " * prefix), (" +$", ""), (" {2,}", " ")):
            steps.append(normalizers.Replace(Regex(spaces), one))
    if prefix and every_stretch:
        steps.append(normalizers.Prepend(_SPACE))
    if prefix and not every_stretch:
        # Only a pre-tokenizer knows where a text begins.
        backend.pre_tokenizer = Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    backend.add_tokens(
        [
            AddedToken(piece.text, special=piece.kind != _USER_DEFINED, normalized=False)
            for piece in model.pieces
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _bpe(model: SentencePieces, models: Any) -> Any:
    return models.BPE(
        {piece.text: number for number, piece in enumerate(model.pieces)},
        _merges(model.pieces),
        unk_token=model.special.get("unk_token"),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Pairs in the order in which they are merged: by the score of what they make."""
    known = {p.text: n for n, p in enumerate(pieces) if p.kind in (_NORMAL, _USER_DEFINED)}
    merges = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        if piece.kind == _NORMAL:
            text = piece.text
            cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
            pairs = [(left, right) for left, right in cuts if left in known and right in known]
            merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges


def _unigram(model: SentencePieces, models: Any) -> Any:
    lowest = min((p.score for p in model.pieces if p.kind == _NORMAL), default=0.0)
    return models.Unigram(
        # What is no word must never be the best reading of a text that spells it out.
        [
            (p.text, p.score if p.kind in (_NORMAL, _USER_DEFINED) else lowest * len(p.text) - 1)
            for p in model.pieces
        ],
        next((n for n, p in enumerate(model.pieces) if p.kind == _UNKNOWN), None),
        model.byte_fallback,
    )


def _piece(data: bytes) -> Piece:
    fields = _by_number(data)
    [score] = struct.unpack("<f", _last(fields, 2, bytes(4)))
    return Piece(_last(fields, 1, b"").decode("utf-8"), score, _last(fields, 3, _NORMAL))


def _last(fields: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    """A field's value: of several the last one counts."""
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise ValueError("a field of another type")
    return value


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _by_number(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer's message, whatever they mean."""
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        else:
            length = {1: 8, 5: 4}.get(wire, len(data))
        if place + length > len(data):
            raise ValueError("ends within a field")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the highest bit says that another byte follows."""
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
