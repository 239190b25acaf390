"""The files in which Hugging Face directories keep a tokenizer, in all their spellings."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._errors import InputError, first_line
from ._sentencepiece import read_sentencepiece, to_backend

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MORE_TEMPLATES = "additional_chat_templates"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_ENDOFTEXT = "<|endoftext|>"
# Where Qwen 2 and 3 cut a text before they merge bytes; GPT-2's own places are the library's.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast")


class Opened(NamedTuple):
    """A `tokenizers.Tokenizer`, and what its files say of its special tokens.

    `first_space` tells that a space at the beginning of a text is taken for the one that the
    tokenizer puts there, where the model's own tokenizer knows both.
    """

    backend: Any
    special: Mapping[str, str]
    first_space: bool = False


def tokenizer_file(directory: Path) -> Path | None:
    """The file of a directory that holds the vocabulary, None without one."""
    return next((directory / n for n in _TOKENIZERS if (directory / n).is_file()), None)


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """All files of a directory that say something of the tokenizer."""
    files = [directory / name for name in _FILES if (directory / name).is_file()]
    return (*files, *sorted((directory / _MORE_TEMPLATES).glob("*.jinja")))


def write_tokenizer(
    directory: Path, backend: Any, files: Sequence[Path], special: Mapping[str, str]
) -> None:
    """Write a tokenizer that its files no longer describe as a `tokenizer.json`.

    Args:
        directory: Where to write.
        backend: The `tokenizers.Tokenizer`.
        files: Those it came from; what tells no vocabulary is copied.
        special: `bos_token` and its like to their texts.
    """
    backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {}
    for file in files:
        if file.name == "tokenizer_config.json":
            config = read_json(file)
        elif file.name not in (*_TOKENIZERS, "merges.txt", "added_tokens.json"):
            copy_file(file, files[0].parent, directory)
    # The ids stand in tokenizer.json now, and this list has not all of them.
    config.pop("added_tokens_decoder", None)
    text = json.dumps({**special, **config}, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(f"{text}\n", "utf-8")


def copy_file(file: Path, root: Path, directory: Path) -> None:
    """Copy a file of `root` to the same place in `directory`."""
    place = directory / file.relative_to(root)
    place.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, place)


def open_tokenizer(directory: Path, config: Mapping[str, Any]) -> Opened:
    """The tokenizer of a directory: what `tokenizer_file` names, and the files that complete it.

    Args:
        directory: A Hugging Face model directory.
        config: What its `tokenizer_config.json` says.

    Raises:
        InputError: if none of the files is there, one is broken, or their tokens contradict.
    """
    file, named = tokenizer_file(directory), _named(directory, config)
    if file is None:
        raise InputError(
            f"{directory}: no tokenizer; looked for tokenizer.json, tokenizer.model (SentencePiece)"
            " and vocab.json with merges.txt; copy the model's tokenizer files there"
        )
    if file.name == "tokenizer.json":
        return Opened(_from_json(file), named)
    read = _from_sentencepiece if file.name == "tokenizer.model" else _from_vocabulary
    opened = read(file, config, named)
    with library_refuses(f"{directory}: its added tokens are none"):
        _add_tokens(opened.backend, directory, config, opened.special)
    return opened


@contextlib.contextmanager
def library_refuses(what: str) -> Iterator[None]:
    """What `tokenizers` does not take in a line: it raises bare exceptions, and panics."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise InputError(f"{what} ({first_line(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A directory's chat templates by name; where there is one, it is the `default`.

    Args:
        directory: A Hugging Face model directory.
        config: What its `tokenizer_config.json` says.

    Raises:
        InputError: if a file is not what its name says.
    """
    found = _by_name(read_json(directory / "chat_template.json").get("chat_template"))
    found |= _by_name(config.get("chat_template"))
    files = [("default", directory / "chat_template.jinja")]
    files += [(f.stem, f) for f in sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))]
    for name, file in files:
        if file.is_file():
            try:
                found[name] = file.read_text("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file}: not UTF-8; save the file as UTF-8") from None
    return found


def _by_name(template: Any) -> dict[str, str]:
    """One template, or a list of named ones."""
    if isinstance(template, str):
        return {"default": template}
    named = template if isinstance(template, list) else []
    pairs = [(t.get("name"), t.get("template")) for t in named if isinstance(t, dict)]
    return {n: text for n, text in pairs if n and isinstance(n, str) and isinstance(text, str)}


def _named(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = {name: token for name, token in config.items() if token is not None}
    named = {**read_json(directory / "special_tokens_map.json"), **given}
    return {n: text for n in _NAMED if (text := _text(named.get(n))) is not None}


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _from_json(file: Path) -> Any:
    import tokenizers

    with library_refuses(f"{file}: not a tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    # What the file says about cutting and filling would happen silently on every encode.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_sentencepiece(file: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> Opened:
    from tokenizers import processors

    model = read_sentencepiece(file)
    own = config.get("add_prefix_space")
    prefix = own if isinstance(own, bool) else model.dummy_prefix
    legacy = config.get("legacy") is True
    backend = to_backend(model, prefix=prefix, every_stretch=legacy)
    special = {**model.special, **named}
    bos = special.get("bos_token")
    number = backend.token_to_id(bos) if bos else None
    if number is not None and config.get("add_bos_token") is not False:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, number)]
        )
    return Opened(backend, special, prefix and not legacy and not model.trims)


def _from_vocabulary(file: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> Opened:
    """Byte-level BPE: GPT-2's files, which Qwen 2 and 3 have too."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges, kind = file.with_name("merges.txt"), config.get("tokenizer_class", _GPT2_CLASSES[0])
    kind = " ".join(str(kind).split())
    if not merges.is_file():
        raise InputError(f"{merges}: not there, but vocab.json is; copy it, or a tokenizer.json")
    if kind not in (*_QWEN_CLASSES, *_GPT2_CLASSES):
        raise InputError(
            f"{file}: how {kind} cuts a text is not known here; give the model's tokenizer.json"
        )
    with library_refuses(f"{file}: no vocabulary to {merges.name}"):
        backend = Tokenizer(models.BPE.from_file(str(file), str(merges)))
    space = config.get("add_prefix_space") is True
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if kind in _QWEN_CLASSES:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    if not named and backend.token_to_id(_ENDOFTEXT) is not None:
        named = {"bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT}
    return Opened(backend, named)


def _add_tokens(
    backend: Any, directory: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add what the vocabulary lacks, each under the id that the files give it."""
    from tokenizers import AddedToken

    marks = [*special.values(), *_additional(directory, config)]
    listed: dict[int, Any] = {}
    for text, number in read_json(directory / "added_tokens.json").items():
        mark = text in marks
        listed[_id(number, directory)] = AddedToken(text, special=mark, normalized=not mark)
    for number, token in _object(config, "added_tokens_decoder", directory).items():
        listed[_id(number, directory)] = _added(token)
    for number, token in sorted(listed.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise InputError(
                f"{directory}: added token {token.content!r} has the id {number}, but would get"
                f" {backend.token_to_id(token.content)}; give a tokenizer.json, which tells the ids"
            )
    known = [text for text in dict.fromkeys(marks) if backend.token_to_id(text) is not None]
    mine = {token.content for token in listed.values()}
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in known if text not in mine]
    )


def _additional(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Marks without a part of their own: a list of them, or names to them."""
    found: list[Any] = []
    for part in (config, read_json(directory / "special_tokens_map.json")):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            given = part.get(name) or []
            found += given.values() if isinstance(given, dict) else _list(given)
    return [text for token in found if (text := _text(token)) is not None]


def _object(config: Mapping[str, Any], name: str, directory: Path) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{directory / 'tokenizer_config.json'}: {name} must be a JSON object")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _id(number: Any, directory: Path) -> int:
    if str(number).isdecimal():
        return int(number)
    raise InputError(f"{directory}: an added token has the id {number!r}; it must be a number")


def _added(token: Any) -> Any:
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = token if isinstance(token, dict) else {"content": token, "normalized": False}
    told = {flag: given[flag] for flag in flags if isinstance(given.get(flag), bool)}
    return AddedToken(str(given.get("content", "")), **told)
