"""A model's tokenizer, read from its Hugging Face directory without transformers."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsInt

from ._errors import InputError
from ._tokenizer_files import (
    copy_file,
    library_refuses,
    open_tokenizer,
    read_json,
    read_templates,
    tokenizer_files,
    write_tokenizer,
)

# A text put before a continuation and taken off again, so that no space is made up at its start.
_ANCHORS = ("\n", ";", "a")
MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[a-z_]{1,30}_of_[a-z]{1,20}>|</?s>")
"""Texts that are written like marks: `<|im_end|>`, `<end_of_turn>`, `</s>`."""
# How byte-level tokenizers spell bytes: printable ones by themselves, the others from U+0100 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
# What Python reads a byte as that is no part of a character.
_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    `encode` never adds a BOS token; data code does, where `add_bos` says so.

    Args:
        backend: The `tokenizers.Tokenizer` of `tokenizer.json`.
        special_tokens: `bos_token`, `eos_token`, … to their text, those that are named.
        bos_id, eos_id, pad_id: Their ids, None where the model has none.
        stop_ids: Every id that ends a generation (`eos_id` among them).
        chat_template: The Jinja source, None without one.
        tool_template: The one for conversations with tools, where that is another.
        add_bos: Whether sequences of this model begin with `bos_id`.
        files: The tokenizer's files, to be copied when a model is saved.
        added: Tokens that `backend` has and the files have not.
        first_space: Whether `backend` takes a space at the beginning of a text for the one that it
            puts there itself, so that another has to be written.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> backend = Backend(models.WordLevel({"yes": 0}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=1)
        >>> tokenizer.encode("yes</s>"), tokenizer.decode([0, 1]), tokenizer.vocab_size
        ([0, 1], 'yes', 2)
    """

    backend: Any = dataclasses.field(repr=False)
    special_tokens: Mapping[str, str]
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    tool_template: str | None = dataclasses.field(default=None, repr=False)
    add_bos: bool = False
    files: tuple[Path, ...] = dataclasses.field(default=(), repr=False)
    added: tuple[str, ...] = ()
    first_space: bool = dataclasses.field(default=False, repr=False)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer.model`, or `vocab.json` with `merges.txt`.

        The files may be those of transformers 4 or 5: a token is a string or an object with
        its `content`, the chat template stands in `tokenizer_config.json` or in a file.

        Raises:
            InputError: if there is none of them, if a file is broken, or if a BOS or EOS token is
                named that the vocabulary does not hold.
        """
        path = Path(path)
        config = read_json(path / "tokenizer_config.json")
        backend, named, first_space = open_tokenizer(path, config)
        special, templates = dict(named), read_templates(path, config)
        generation = {**read_json(path / "config.json"), **_only_ids(path)}
        ids, stops = {}, set()
        for name in ("bos_token", "eos_token", "pad_token"):
            fallback = _id_list(generation.get(f"{name}_id"))
            ids[name] = _token_id(backend, special.get(name), path, name)
            if ids[name] is None and fallback:
                ids[name] = fallback[0]
                # A template writes what ends a turn, but no BOS that the tokenizer does not name.
                if name == "eos_token":
                    special[name] = backend.id_to_token(fallback[0]) or ""
            if name == "eos_token":
                stops.update(fallback)
        if ids["eos_token"] is not None:
            stops.add(ids["eos_token"])
        return cls(
            backend=backend,
            special_tokens=special,
            bos_id=ids["bos_token"],
            eos_id=ids["eos_token"],
            pad_id=ids["pad_token"],
            stop_ids=tuple(sorted(stops)),
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
            add_bos=_adds_bos(backend, config, ids["bos_token"], path),
            files=tokenizer_files(path),
            first_space=first_space,
        )

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that are marks rather than text."""
        added = self.backend.get_added_tokens_decoder()
        marked = {number for number, token in added.items() if token.special}
        # A file may call a token plain that its config gives this part to play.
        named = {self.bos_id, self.eos_id, *self.stop_ids} & added.keys()
        return frozenset(marked | named)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that a text is searched for before it is cut, marks and others."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of those marks."""
        return tuple(self.backend.id_to_token(number) for number in sorted(self.special_ids))

    def with_tokens(self, texts: Sequence[str]) -> "Tokenizer":
        """The tokenizer with a token of its own for each text, under the next ids.

        Texts that `MARK` matches become marks, which decoded text leaves out.

        Raises:
            InputError: if a text is a token already, is given twice, is empty or begins or ends
                with a space.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        for n, text in enumerate(texts):
            known = self.token_id(text)
            if known is not None or text in texts[:n]:
                what = "given twice" if known is None else f"a token already (id {known})"
                raise InputError(f"model.add_tokens: {text!r} is {what}; take it out")
            if not text or text != text.strip():
                raise InputError(
                    f"model.add_tokens: {text!r} cannot be a token; give a text without spaces at"
                    " its ends"
                )
        backend = Backend.from_str(self.backend.to_str())
        backend.add_tokens(
            [AddedToken(t, special=bool(MARK.fullmatch(t)), normalized=False) for t in texts]
        )
        ids = [backend.token_to_id(text) for text in texts]
        if any(number is None or number < self.vocab_size for number in ids):
            raise InputError(
                "model.add_tokens: the vocabulary has gaps, and a new token would get an id in use;"
                " give a tokenizer.json without gaps"
            )
        return dataclasses.replace(self, backend=backend, added=(*self.added, *texts))

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files to a directory: copies, unless tokens were added."""
        if self.added:
            write_tokenizer(directory, self.backend, self.files, self.special_tokens)
            return
        for file in self.files:
            copy_file(file, self.files[0].parent, directory)

    def token_id(self, text: str) -> int | None:
        """The id of one token by its text, None where there is no such token."""
        return self.backend.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; marks such as `</s>` in it become their one token."""
        return self.backend.encode(self._spaced(text), add_special_tokens=False).ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """Put BOS in front where the model wants it, unless it is there already."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[SupportsInt], *, special: bool = False) -> str:
        """Text of token ids; marks are left out unless `special` asks for them.

        Bytes that form no character become U+FFFD, the characters beside them do not.
        """
        kept = [int(i) for i in ids if special or int(i) not in self.special_ids]
        if self._byte_tokens:
            kept = _well_formed(kept, self._byte_tokens)
        return self.backend.decode(kept, skip_special_tokens=not special)

    def token_text(self, token_id: int) -> str:
        """The text that one token adds to others, the space at its beginning included."""
        before = self.encode("a")
        whole = self.decode([*before, token_id], special=True)
        return whole[len(self.decode(before, special=True)) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The same in bytes, where it may be a part of a character."""
        text = self.token_text(token_id)
        if token_id in self._byte_tokens:
            return bytes([self._byte_tokens[token_id]])
        spelled = self.backend.id_to_token(token_id) or ""
        if "\ufffd" not in text or not set(spelled) <= _BYTES.keys():
            return text.encode()
        return bytes(_BYTES[letter] for letter in spelled)

    def encode_segments(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of many texts, each given in segments that are encoded on their own.

        No token crosses the border between two segments, and the tokens of the first segments
        do not depend on what follows: a prompt has the same tokens with and without its answer.

        Args:
            texts: For each text its segments.

        Returns:
            For each text, for each segment, its ids.
        """
        anchor = _ANCHORS[0] if self._makes_up_space else ""
        flat = [(anchor if n else "") + text for parts in texts for n, text in enumerate(parts)]
        flat = [self._spaced(text) for text in flat]
        encoded = iter(self.backend.encode_batch(flat, add_special_tokens=False))
        before = self.encode(anchor)
        result = []
        for segments in texts:
            ids = [next(encoded).ids for _ in segments]
            for n, whole in enumerate(ids[1:], 1):
                held = whole[: len(before)] == before
                ids[n] = whole[len(before) :] if held else self._encode_continuation(segments[n])
            result.append(ids)
        return result

    def _spaced(self, text: str) -> str:
        return " " + text if self.first_space and text.startswith((" ", "▁")) else text

    @cached_property
    def _makes_up_space(self) -> bool:
        """Whether the tokenizer puts a space before a text (Llama 2 and its like)."""
        return any(
            part.get("type") == "Prepend"
            or part.get("prepend_scheme", "never") != "never"
            or part.get("add_prefix_space") is True
            for part in [*_parts(self.backend.normalizer), *_parts(self.backend.pre_tokenizer)]
        )

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """Ids of the tokens `<0x00>` … `<0xFF>`, where the tokenizer spells bytes so."""
        if not any(part.get("type") == "ByteFallback" for part in _parts(self.backend.decoder)):
            return {}
        found = {self.token_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {} if None in found else {i: byte for i, byte in found.items() if i is not None}

    def _encode_continuation(self, text: str) -> list[int]:
        for anchor in _ANCHORS[1:]:
            before, whole = self.encode(anchor), self.encode(anchor + text)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self.encode(text)


def _only_ids(directory: Path) -> dict[str, Any]:
    """Token ids of `generation_config.json`, without its nulls."""
    raw = read_json(directory / "generation_config.json")
    return {k: v for k, v in raw.items() if k.endswith("_token_id") and v is not None}


def _token_id(backend: Any, text: str | None, directory: Path, name: str) -> int | None:
    number = backend.token_to_id(text) if text else None
    if text and number is None and name in ("bos_token", "eos_token"):
        raise InputError(
            f"{directory}: {name} is {text!r}, which the vocabulary does not hold; correct"
            " tokenizer_config.json"
        )
    return number


def _id_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int)]


def _adds_bos(backend: Any, config: Mapping[str, Any], bos_id: int | None, path: Path) -> bool:
    """What the config says, or else what the post-processor does."""
    if bos_id is None:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    with library_refuses(f"{path}: the tokenizer cannot cut a text"):
        return backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def _parts(component: Any) -> list[dict[str, Any]]:
    """What a normalizer, pre-tokenizer or decoder consists of, its sequences taken apart."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(node: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [node.get(name) or [] for name in ("normalizers", "pretokenizers", "decoders")]
    return [node, *(part for child in itertools.chain(*inner) for part in _flat(child))]


def _well_formed(ids: list[int], byte_of: Mapping[int, int]) -> list[int]:
    """Ids whose byte tokens spell characters; each byte that belongs to none becomes U+FFFD.

    The library would replace a whole run of bytes for one that is wrong, and lose the text before
    a character that was cut off.  sentencepiece, where these tokenizers come from, does it so.
    """
    id_of = {byte: number for number, byte in byte_of.items()}
    result: list[int] = []
    for is_bytes, run in itertools.groupby(ids, byte_of.__contains__):
        if is_bytes:
            text = bytes(byte_of[number] for number in run).decode("utf-8", "surrogateescape")
            run = [id_of[byte] for byte in _ESCAPED.sub("\ufffd", text).encode()]
        result += run
    return result
