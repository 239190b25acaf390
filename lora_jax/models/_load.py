"""Hugging Face directories read in, a tensor at a time, quantized on the way."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._errors import InputError
from .._hub import DESCRIPTION, WEIGHTS, local_directory
from .._names import hf_keys, is_transposed
from .._quant_config import QuantConfig
from .._tokenizer_files import tokenizer_file
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Params
from ..lora import KernelLayout
from ._attention import attention_path
from ._checkpoint import (
    DTYPES,
    Entry,
    checkpoint_entries,
    float_dtype,
    read_config,
    read_storage,
)
from ._config import ModelConfig
from ._decoder import CausalLM
from ._formats import abstract_params, quant_of, stacked_axes
from ._read import read_leaf
from ._read_placed import Place, read_placed

NO_FLOAT16 = "JAX has no float16 attention on CPUs; use bfloat16 or float32"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model read from a directory.

    `tokenizer` is a `lora_jax._tokenizer.Tokenizer`, or None when the directory has none.
    """

    module: CausalLM
    params: Params
    config: ModelConfig
    tokenizer: Any
    directory: Path

    @property
    def stacked(self) -> tuple[str, ...]:
        """The paths whose leaves carry a leading axis of layers."""
        return (self.config.family.stack,)

    @property
    def attention_path(self) -> str:
        """How attention is computed here: `cudnn`, or `xla` and why."""
        c = self.config
        group = c.num_attention_heads // c.num_key_value_heads
        return attention_path(self.module.dtype, group, c.head_dim, c.attn_logit_softcapping)

    @property
    def layouts(self) -> dict[str, KernelLayout]:
        """What `init_adapter`, `merge_adapter` and `save_adapter` need to know of the stacks."""
        return {stack: KernelLayout(stack=stack) for stack in self.stacked}


def load_pretrained(
    directory: str | Path,
    *,
    quant: QuantConfig | None = None,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str = "everything",
    place: Place | None = None,
) -> Pretrained:
    """Read a Hugging Face directory: `config.json`, `*.safetensors`, the tokenizer's files.

    Kernels are stored as `(layers, d_in, d_out)`, mostly the transpose of the file's `weight`.

    Args:
        directory: The directory; or, with the extra `hub`, a name such as `Qwen/Qwen3-0.6B` or
            `Qwen/Qwen3-0.6B@main`, which is downloaded once.
        quant: Quantize the linear kernels of the blocks as they are read, and the embedding and
            the head where it says so. Kernels that bitsandbytes quantized to 4 bits are read as
            they are, without it.
        dtype: Type of the activations: `"float32"`, `"bfloat16"` or `"float16"`.
        param_dtype: Type of the dense parameters; None keeps the file's.
        remat: What the backward pass keeps of a layer: `"everything"`, `"nothing"` (its input
            only), `"dots"`, `"names"` or `"offload"` (see `REMAT_POLICIES`).
        place: Where each parameter belongs on a mesh of devices, of one process or many: called
            with a leaf's path and its `jax.ShapeDtypeStruct`, or a `QuantizedTensor` of them, it
            returns the same with a `NamedSharding` for each array. A process then reads from the
            files what its own devices hold, and what is quantized is quantized in its place, to
            the same bits.

    Returns:
        The module, its parameters, config and tokenizer.

    Raises:
        InputError: if a file is missing, broken or a pickle; if tensors are missing,
            unexpected or do not fit the config; if the tokenizer's vocabulary exceeds the
            model's; if the device cannot compute in `dtype`; if a weight to be quantized is
            not finite.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from lora_jax.models import CausalLM, ModelConfig, save_pretrained
        >>> config = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> ids = jnp.ones((1, 8), jnp.int32)
        >>> params = CausalLM(config).init(jax.random.key(0), ids)["params"]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(f"{directory}/model", params, config, dtype="bfloat16")
        ...     pretrained = load_pretrained(f"{directory}/model")
        >>> pretrained.module.apply({"params": pretrained.params}, ids).shape
        (1, 8, 64)
    """
    directory = local_directory(directory, (*DESCRIPTION, WEIGHTS))
    config = read_config(directory)
    if dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError(f"dtype: {NO_FLOAT16}")
    module = CausalLM(config, dtype=float_dtype(dtype, "dtype"), remat=remat)
    if param_dtype is not None:
        float_dtype(param_dtype, "param_dtype")
    entries = checkpoint_entries(directory, config.family)
    plan = _checked(directory, config, entries)
    tokenizer = _tokenizer(directory, config)
    read = read_leaf if place is None else functools.partial(read_placed, place=place)
    leaves = {}
    for path, parts in plan.items():
        own = quant_of(path, quant, config.family)
        leaves[path] = read(path, parts, own, param_dtype, config.family)
    return Pretrained(module, tree_from_paths(leaves), config, tokenizer, directory)


def load_without_weights(
    directory: str | Path,
    *,
    quant: QuantConfig | None = None,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str = "everything",
) -> Pretrained:
    """As `load_pretrained`, from `config.json` and any tokenizer alone: `params` are shapes.

    Args:
        directory: Holds `config.json` and, for text, the tokenizer's files; or a name, as for
            `load_pretrained`.
        quant: The format of kernels, embedding and head; as the config describes it where it
            tells of a checkpoint in four bits.
        dtype: Type of the activations.
        param_dtype: Type of the dense parameters; None takes the one that the config names.
        remat: What the backward pass keeps of a layer.

    Raises:
        InputError: if the config or the tokenizer is missing, broken or does not fit.
    """
    directory = local_directory(directory, DESCRIPTION)
    config = read_config(directory)
    stored = read_storage(directory)
    module = CausalLM(config, dtype=float_dtype(dtype, "dtype"), remat=remat)
    if stored.quant is not None and quant is not None:
        raise InputError(f"{directory}: is in four bits already; leave quant out")
    params = abstract_params(
        config, quant=quant or stored.quant, param_dtype=param_dtype or stored.dtype
    )
    return Pretrained(module, params, config, _tokenizer(directory, config), directory)


def _checked(
    directory: Path, config: ModelConfig, entries: dict[str, Entry]
) -> dict[str, list[Entry]]:
    """The tensors of each leaf, once names, shapes and types are known to fit the config."""
    family = config.family
    stack = (family.stack,)
    (head,), (table,) = (hf_keys(path, (), 1) for path in (family.head_kernel, family.table))
    if config.tie_word_embeddings and head in entries:
        entries = dict(entries)
        _check_tied(entries.get(table), entries.pop(head))
    if config.num_hidden_layers > len(entries):  # names of so many layers may fill the memory
        raise InputError(
            f"{directory / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, but the"
            f" weights are {len(entries)} tensors in all"
        )
    shapes = dict(leaves_with_path(abstract_params(config)))
    keys = {path: hf_keys(path, stack, config.num_hidden_layers) for path in shapes}
    expected = {key for names in keys.values() for key in names}
    _check_names(directory, expected, set(entries))
    for path, leaf in shapes.items():
        shape = leaf.shape[stacked_axes(path, family) :]
        shape = shape[::-1] if is_transposed(path) else shape
        for entry in (entries[key] for key in keys[path]):
            if entry.shape != shape:
                raise InputError(
                    f"{entry.file}: {entry.key} has shape {entry.shape}, but config.json"
                    f" implies {shape}; the two are not of one model"
                )
            if entry.dtype not in DTYPES:
                raise InputError(
                    f"{entry.file}: {entry.key} has type {entry.dtype}; known:"
                    f" {', '.join(DTYPES)} (give the float checkpoint)"
                )
    return {path: [entries[key] for key in names] for path, names in keys.items()}


def _check_names(directory: Path, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} of {len(expected)} tensors are missing, the first is"
            f" {missing[0]}; check num_hidden_layers, the biases and tie_word_embeddings in"
            " config.json, or copy the weights again"
        )
    if unexpected:
        raise InputError(
            f"{directory}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]};"
            " config.json describes a model without them"
        )


def _check_tied(embedding: Entry | None, head: Entry) -> None:
    """A file may hold the tied head too, if it says the same."""
    if embedding is not None and not np.array_equal(embedding.read(), head.read()):
        raise InputError(
            f"{head.file}: {head.key} differs from the embedding although config.json says"
            " tie_word_embeddings; set it to false"
        )


def _tokenizer(directory: Path, config: ModelConfig) -> Any:
    file = tokenizer_file(directory)
    if file is None:
        return None
    from .._tokenizer import Tokenizer  # pulls in `tokenizers`

    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{file}: {tokenizer.vocab_size} tokens, but the model knows"
            f" {config.vocab_size} (vocab_size); give the tokenizer the model was trained with"
        )
    return tokenizer
