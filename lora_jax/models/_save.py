"""Parameters written as a Hugging Face directory that transformers reads."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._errors import InputError, nearest
from .._files import atomic_directory, write_tensors
from .._names import hf_keys, is_transposed, stack_of
from .._tree import leaves_with_path
from .._typing import Params
from ..quant import QuantizedTensor, dequantize
from ._checkpoint import float_dtype
from ._config import ModelConfig
from ._config_json import config_to_hf
from ._formats import abstract_params


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file to be, made when it is written."""

    key: str
    nbytes: int
    make: Callable[[], np.ndarray]


def save_pretrained(
    directory: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    dtype: str,
    tokenizer: Any = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a model in Hugging Face layout, whole or not at all.

    Kernels are transposed back to the file's `weight`, stacks are cut into
    layers, quantized kernels are dequantized a layer at a time.

    Args:
        directory: A directory that does not exist yet or is empty.
        params: The tree of a `CausalLM`, dense or quantized, without adapter leaves.
        config: The model's shape.  With a head in `params`, as a merge may add one, the file
            says `tie_word_embeddings: false`.
        dtype: Type of the tensors in the file.
        tokenizer: A tokenizer that is saved beside it.
        max_shard_bytes: Above this size the tensors go to several files with an index; one
            file's tensors are in memory together.

    Raises:
        InputError: if the directory holds something, the disk is full, the tree is not that
            of the config, or a weight is not finite in `dtype`.

    Example:
        See `load_pretrained`.
    """
    save_as = float_dtype(dtype, "dtype")
    if config.family.head in params:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    _check_tree(params, config)
    stack = config.family.stack
    tensors = [t for path, x in leaves_with_path(params) for t in _tensors(path, x, save_as, stack)]
    with atomic_directory(Path(directory)) as out:
        _write_shards(out, tensors, max_shard_bytes)
        _write_json(out / "config.json", config_to_hf(config, dtype))
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id")}
        if any(value is not None for value in ids.values()):
            ids["pad_token_id"] = config.pad_token_id
            known = {name: value for name, value in ids.items() if value is not None}
            _write_json(out / "generation_config.json", known)
        if tokenizer is not None:
            tokenizer.save(out)


def _check_tree(params: Params, config: ModelConfig) -> None:
    expected = dict(leaves_with_path(abstract_params(config)))
    found = dict(leaves_with_path(params))
    for path in found:
        if path not in expected:
            raise InputError(
                f"params: unexpected leaf {path}{nearest(path, expected)}; merge an adapter"
                " (merge_adapter) before saving the model"
            )
    for path, leaf in expected.items():
        if path not in found:
            raise InputError(f"params: {path} is missing; is this the config of another model?")
        if tuple(found[path].shape) != leaf.shape:
            raise InputError(
                f"params: {path} has shape {tuple(found[path].shape)}, but the config implies"
                f" {leaf.shape}"
            )


def _tensors(path: str, leaf: Any, dtype: Any, stack: str) -> list[_Tensor]:
    """The file's tensors behind one leaf."""
    stacked = stack_of(path, (stack,)) is not None
    layers = leaf.shape[0] if stacked else 1

    def make(i: int) -> np.ndarray:
        part = leaf
        if stacked:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), leaf)
        if isinstance(part, QuantizedTensor):
            part = dequantize(part, dtype)
        with np.errstate(over="ignore"):  # said below, with the tensor's name
            array = np.asarray(part).astype(dtype)
        if not np.isfinite(array).all():
            raise InputError(
                f"params: {path} holds values that are not finite in {dtype}; save as bfloat16 or"
                " float32, or look at the weights"
            )
        return np.ascontiguousarray(array.T if is_transposed(path) else array)

    nbytes = int(np.prod(leaf.shape)) // layers * np.dtype(dtype).itemsize
    return [
        _Tensor(key, nbytes, lambda i=i: make(i))
        for i, key in enumerate(hf_keys(path, (stack,), layers))
    ]


def _write_shards(directory: Path, tensors: list[_Tensor], limit: float) -> None:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", {t.key: t.make() for t in shards[0]})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / name, {t.key: t.make() for t in shard})
        weight_map |= {t.key: name for t in shard}
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
