"""Every file that is read, broken somewhere: read all the same, or refused in a line."""

import json
import struct
from pathlib import Path

import jax
import pytest
from hypothesis import strategies as st

from lora_jax import LoraConfig, init_adapter
from lora_jax._files import open_tensors
from lora_jax._tokenizer import Tokenizer
from lora_jax.adapters import adapter_notes, load_adapter, save_adapter
from lora_jax.data import read_rows
from lora_jax.models import load_pretrained
from lora_jax.models._checkpoint import checkpoint_entries, read_config, read_storage
from tests.broken import (
    broken_bytes,
    broken_json,
    check,
    is_read_or_refused,
    json_bytes,
)  # fmt: skip

many = pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.slow)])


def written(path: Path, read):
    """A test of what is read once something is written to a file."""

    def test(content: bytes) -> None:
        path.write_bytes(content)
        is_read_or_refused(read)

    return test


@pytest.fixture(scope="module")
def adapter(base_dir, tmp_path_factory):
    base = load_pretrained(base_dir)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(
        directory,
        init_adapter(jax.random.key(0), base.params, config, layouts=base.layouts),
        config,
        layouts=base.layouts,
    )
    return directory, base


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def tensors_file(header: bytes, length: int | None = None) -> bytes:
    n = len(header) if length is None else length
    return struct.pack("<Q", n % 2**64) + header + bytes(22)


def read_all(path: Path) -> None:
    with open_tensors(path) as file:
        for name in list(file.keys()):
            file.get_slice(name).get_shape()
            file.get_tensor(name)


@many
def test_safetensors(examples, tmp_path):
    path = tmp_path / "a.safetensors"
    whole = tensors_file(json_bytes(HEADER))
    headers = broken_json(HEADER).map(lambda h: tensors_file(json_bytes(h)))
    lengths = st.integers(-3, 2**64).map(lambda n: tensors_file(json_bytes(HEADER), n))
    twice = st.just(
        tensors_file(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
    )
    check(
        written(path, lambda: read_all(path)),
        broken_bytes(whole) | headers | lengths | twice,
        4 * examples,
    )


@many
def test_adapters_config(examples, adapter):
    directory, base = adapter
    file = directory / "adapter_config.json"
    whole = file.read_bytes()
    test = written(file, lambda: load_adapter(directory, base.params, layouts=base.layouts))
    try:
        check(
            test, broken_json(json.loads(whole)).map(json_bytes) | broken_bytes(whole), 3 * examples
        )
    finally:
        file.write_bytes(whole)


@many
def test_adapters_tensors(examples, adapter):
    directory, base = adapter
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    test = written(file, lambda: load_adapter(directory, base.params, layouts=base.layouts))
    n = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + n]), whole[8 + n :]

    def again(h):
        h = json_bytes(h)
        return struct.pack("<Q", len(h)) + h + rest

    try:
        check(test, broken_json(header).map(again) | broken_bytes(whole), 2 * examples)
    finally:
        file.write_bytes(whole)


NOTES = {"template": "chatml", "add_tokens": ["<x>"]}


@many
def test_adapters_notes(examples, tmp_path):
    from lora_jax.adapters._notes import NOTES_FILE

    check(
        written(tmp_path / NOTES_FILE, lambda: adapter_notes(tmp_path)),
        broken_json(NOTES).map(json_bytes) | broken_bytes(json_bytes(NOTES)),
        examples,
    )


ROWS = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "s",
    },
    {"instruction": "a", "input": "", "output": "b", "history": [["q", "a"]]},
    {
        "prompt": [{"role": "user", "content": "x"}],
        "completion": [{"role": "assistant", "content": "x"}],
    },
    {"prompt": "a", "completion": "b"},
    {"text": "a"},
]


@many
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_rows(examples, number, tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json_bytes(ROWS[number])
    check(
        written(path, lambda: read_rows(str(path))),
        broken_json(ROWS[number]).map(json_bytes) | broken_bytes(whole),
        examples,
    )


@many
@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".txt"])
def test_files_of_rows(examples, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    whole = (
        json_bytes(ROWS[2:3] * 2)
        if suffix == ".json"
        else b'instruction,input,output\na,"b\nc",d\ne;,f,"g"\n'
    )
    check(
        written(path, lambda: read_rows(str(path))),
        broken_bytes(whole) | st.text(alphabet='a,;"\n\r\t\0').map(str.encode),
        examples,
    )


@many
def test_parquet(examples, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    check(
        written(path, lambda: read_rows(str(path))), broken_bytes(path.read_bytes()), 2 * examples
    )


def read_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode("one two <s> é\0")
    tokenizer.decode(ids)
    assert tokenizer.vocab_size > 0


@many
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
        "generation_config.json",
    ],
)
def test_tokenizers_files(examples, name, base_dir, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((base_dir / file).read_bytes())
    marks = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "additional_special_tokens": ["<x>"],
    }
    whole = {
        "tokenizer.json": json.loads((base_dir / "tokenizer.json").read_text()),
        "tokenizer_config.json": {
            **marks,
            "chat_template": [{"name": "default", "template": "x"}],
            "add_bos_token": True,
            "added_tokens_decoder": {"2": {"content": "<pad>", "special": True}},
        },
        "special_tokens_map.json": marks,
        "config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
    }[name]
    if name == "tokenizer.json":
        vocab = whole["model"]["vocab"]
        whole["model"]["vocab"] = dict(list(vocab.items())[:5])
        whole["model"]["merges"] = whole["model"]["merges"][:0]
        whole["added_tokens"] = whole["added_tokens"][:2]
    if name == "special_tokens_map.json":
        (tmp_path / "tokenizer_config.json").write_text("{}")
    test = written(tmp_path / name, lambda: read_tokenizer(tmp_path))
    check(test, broken_json(whole).map(json_bytes) | broken_bytes(json_bytes(whole)), 2 * examples)


@many
@pytest.mark.parametrize(
    "name",
    [
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer_config.json",
        "chat_template.json",
    ],
)
def test_files_of_a_vocabulary(examples, name, tmp_path):
    whole = {
        "vocab.json": json_bytes({"a": 0, "b": 1, "ab": 2, "\u0120": 3}),
        "merges.txt": b"#version: 0.2\na b\n",
        "added_tokens.json": json_bytes({"<x>": 4, "<y>": 5}),
        "tokenizer_config.json": json_bytes(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "bos_token": "<x>",
                "added_tokens_decoder": {"6": {"content": "<z>", "lstrip": True}},
                "extra_special_tokens": {"a": "<q>"},
            }
        ),
        "chat_template.json": json_bytes({"chat_template": "x"}),
    }
    for file, content in whole.items():
        (tmp_path / file).write_bytes(content)
    read_tokenizer(tmp_path)
    changes = broken_bytes(whole[name])
    if name != "merges.txt":
        changes = changes | broken_json(json.loads(whole[name])).map(json_bytes)
    test = written(tmp_path / name, lambda: read_tokenizer(tmp_path))
    check(test, changes, 2 * examples)


@many
def test_sentencepiece(examples, tmp_path):
    from tests.test_sentencepiece import BPE, UNIGRAM, bpe_pieces, model

    pieces = bpe_pieces()
    small = [*pieces[:6], *pieces[-8:]]
    test = written(tmp_path / "tokenizer.model", lambda: read_tokenizer(tmp_path))
    for kind in (BPE, UNIGRAM):
        check(test, broken_bytes(model(small, kind, byte_fallback=False)), 2 * examples)


@many
def test_models_config(examples, base_dir, tmp_path):
    whole = json.loads((base_dir / "config.json").read_text())
    whole |= {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "eos_token_id": [1, 2],
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization_config": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    }
    test = written(
        tmp_path / "config.json", lambda: (read_config(tmp_path), read_storage(tmp_path))
    )
    for kind in ("llama", "mistral", "gemma3_text", "gpt2", "smollm3"):
        check(test, broken_json(whole | {"model_type": kind}).map(json_bytes), 2 * examples)
    check(test, broken_bytes(json_bytes(whole)), examples)


@many
def test_index_of_shards(examples, base_dir, tmp_path):
    family = read_config(base_dir).family
    (tmp_path / "a.safetensors").write_bytes(tensors_file(json_bytes(HEADER)))
    whole = {
        "metadata": {"total_size": 22},
        "weight_map": {"a": "a.safetensors", "b": "a.safetensors"},
    }
    test = written(
        tmp_path / "model.safetensors.index.json", lambda: checkpoint_entries(tmp_path, family)
    )
    check(test, broken_json(whole).map(json_bytes) | broken_bytes(json_bytes(whole)), 2 * examples)
