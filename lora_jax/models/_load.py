"""Hugging Face directories read in, a tensor at a time, quantized on the way."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from .._names import hf_keys, is_kernel, stack_of
from .._quant_config import QuantConfig
from .._tokenizer_files import tokenizer_file
from .._tree import leaves_with_path, map_with_path, tree_from_paths
from .._typing import Params
from ..lora import KernelLayout
from ..quant import QuantizedTensor, quantize
from ._attention import attention_path
from ._checkpoint import (
    DTYPES,
    HEAD,
    Entry,
    checkpoint_entries,
    float_dtype,
    read_config,
    read_storage,
)
from ._config import ModelConfig
from ._decoder import STACKED, CausalLM

NO_FLOAT16 = "JAX has no float16 attention on CPUs; use bfloat16 or float32"
_EMBEDDING = "model.embed_tokens.weight"
_TABLE, _HEAD_KERNEL = "model/embed_tokens/embedding", "lm_head/kernel"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model read from a directory.

    `tokenizer` is a `lora_jax._tokenizer.Tokenizer`, or None when the directory has
    none.  `stacked` names the paths whose leaves carry a leading layer axis.
    """

    module: CausalLM
    params: Params
    config: ModelConfig
    tokenizer: Any
    directory: Path
    stacked: tuple[str, ...] = (STACKED,)

    @property
    def attention_path(self) -> str:
        """How attention is computed here: `cudnn`, or `xla` and why."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return attention_path(self.module.dtype, group, self.config.head_dim)

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
) -> Pretrained:
    """Read a Hugging Face directory: `config.json`, `*.safetensors`, `tokenizer.json`.

    Kernels are stored as `(layers, d_in, d_out)`, the transpose of the file's `weight`.

    Args:
        directory: The directory; nothing is downloaded.
        quant: Quantize the linear kernels of the blocks as they are read, and the embedding and
            the head where it says so. Kernels that bitsandbytes quantized to 4 bits are read as
            they are, without it.
        dtype: Type of the activations: `"float32"`, `"bfloat16"` or `"float16"`.
        param_dtype: Type of the dense parameters; None keeps the file's.
        remat: What the backward pass keeps of a layer: `"everything"`, `"nothing"` (its input
            only), `"dots"`, `"names"` or `"offload"` (see `REMAT_POLICIES`).

    Returns:
        The module, its parameters, config and tokenizer.

    Raises:
        InputError: if a file is missing, broken or a pickle; if tensors are missing,
            unexpected or do not fit the config; if the tokenizer's vocabulary exceeds the
            model's; if the device cannot compute in `dtype`; if a weight to be quantized is
            not finite.

    Example:
        >>> import tempfile
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
    directory = Path(directory)
    config = read_config(directory)
    if dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError(f"dtype: {NO_FLOAT16}")
    module = CausalLM(config, dtype=float_dtype(dtype, "dtype"), remat=remat)
    if param_dtype is not None:
        float_dtype(param_dtype, "param_dtype")
    entries = checkpoint_entries(directory)
    plan = _checked(directory, config, entries)
    tokenizer = _tokenizer(directory, config)
    leaves = {}
    for path, parts in plan.items():
        leaves[path] = _read_leaf(path, parts, _quant_of(path, quant), param_dtype)
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
        directory: Holds `config.json` and, for text, `tokenizer.json`.
        quant: The format of kernels, embedding and head; as the config describes it where it
            tells of a checkpoint in four bits.
        dtype: Type of the activations.
        param_dtype: Type of the dense parameters; None takes the one that the config names.
        remat: What the backward pass keeps of a layer.

    Raises:
        InputError: if the config or the tokenizer is missing, broken or does not fit.
    """
    directory = Path(directory)
    config = read_config(directory)
    stored = read_storage(directory)
    module = CausalLM(config, dtype=float_dtype(dtype, "dtype"), remat=remat)
    if stored.quant is not None and quant is not None:
        raise InputError(f"{directory}: is in four bits already; leave quant out")
    params = abstract_params(
        config, quant=quant or stored.quant, param_dtype=param_dtype or stored.dtype
    )
    return Pretrained(module, params, config, _tokenizer(directory, config), directory)


def abstract_params(
    config: ModelConfig, *, quant: QuantConfig | None = None, param_dtype: str = "float32"
) -> Params:
    """The shapes and dtypes of a model's parameters, with nothing allocated.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> abstract_params(config)["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 32, 64)
    """
    dtype = float_dtype(param_dtype, "param_dtype")

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> Any:
        x = jax.ShapeDtypeStruct(x.shape, dtype)
        return _stored(path, x, _quant_of(path, quant))

    return map_with_path(leaf, _shapes(config))


def quantize_params(params: Params, quant: QuantConfig) -> Params:
    """A dense decoder's parameters as `load_pretrained` with `quant` reads them.

    Leaves that are quantized already stay as they are.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> ids = jnp.ones((1, 8), jnp.int32)
        >>> params = CausalLM(config).init(jax.random.key(0), ids)["params"]
        >>> layers = quantize_params(params, QuantConfig())["model"]["layers"]
        >>> layers["mlp"]["up_proj"]["kernel"].format
        'nf4'
    """

    def leaf(path: str, x: Any) -> Any:
        own = _quant_of(path, quant)
        if own is None or isinstance(x, QuantizedTensor):
            return x
        stacked = int(stack_of(path, (STACKED,)) is not None)
        return quantize(x, own, stacked=stacked, contracting=_contracted(path))

    return map_with_path(leaf, params)


@functools.lru_cache(maxsize=16)
def _shapes(config: ModelConfig) -> Params:
    """What the module itself asks for."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(CausalLM(config).init, jax.random.key(0), ids)["params"]


def _checked(
    directory: Path, config: ModelConfig, entries: dict[str, Entry]
) -> dict[str, list[Entry]]:
    """The tensors of each leaf, once names, shapes and types are known to fit the config."""
    if config.tie_word_embeddings and HEAD in entries:
        entries = dict(entries)
        _check_tied(entries.get(_EMBEDDING), entries.pop(HEAD))
    if config.num_hidden_layers > len(entries):  # names of so many layers may fill the memory
        raise InputError(
            f"{directory / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, but the"
            f" weights are {len(entries)} tensors in all"
        )
    shapes = dict(leaves_with_path(abstract_params(config)))
    keys = {path: hf_keys(path, (STACKED,), config.num_hidden_layers) for path in shapes}
    expected = {key for names in keys.values() for key in names}
    _check_names(directory, expected, set(entries))
    for path, leaf in shapes.items():
        shape = leaf.shape[1:] if stack_of(path, (STACKED,)) else leaf.shape
        shape = shape[::-1] if is_kernel(path) else shape
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


def _quant_of(path: str, quant: QuantConfig | None) -> QuantConfig | None:
    """How a leaf is kept: kernels of the blocks, the embedding and the head each have a format."""
    if quant is None:
        return None
    if stack_of(path, (STACKED,)) is not None:
        return quant.of(quant.format) if is_kernel(path) else None
    if path == _TABLE:
        return quant.of(quant.embedding)
    return quant.of(quant.head) if path == _HEAD_KERNEL else None


def _contracted(path: str) -> int | tuple[int, ...]:
    """A table's rows are quantized along their own length."""
    return (1,) if path == _TABLE else 1


def _stored(path: str, x: jax.ShapeDtypeStruct, quant: QuantConfig | None) -> Any:
    """The abstract leaf that an abstract weight becomes."""
    if quant is None:
        return x
    stacked = int(stack_of(path, (STACKED,)) is not None)
    return jax.eval_shape(
        lambda x: quantize(x, quant, stacked=stacked, contracting=_contracted(path)), x
    )


def _read_leaf(
    path: str, parts: list[Entry], quant: QuantConfig | None, param_dtype: str | None
) -> Any:
    """Read one leaf; a stack is allocated once and filled, so one layer at most is twice there."""
    dtype = jnp.dtype(param_dtype or jnp.result_type(*(DTYPES[part.dtype] for part in parts)))
    if any(part.state for part in parts):
        return _read_quantized(path, parts, quant, dtype)
    transpose = is_kernel(path)
    if stack_of(path, (STACKED,)) is None:
        tensor = parts[0].read() if quant is None else _read_finite(parts[0])
        tensor = tensor.T if transpose else tensor
        if quant is None:
            return jnp.array(tensor, dtype)
        return _quantized(jnp.asarray(tensor), quant, contracting=_contracted(path), dtype=dtype)
    shape = parts[0].shape[::-1] if transpose else parts[0].shape
    stack = _stored(path, jax.ShapeDtypeStruct((len(parts), *shape), dtype), quant)
    stack = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stack)
    for i, part in enumerate(parts):
        tensor = part.read() if quant is None else _read_finite(part)
        filled = _fill(stack, tensor, i, transpose=transpose, quant=quant)
        # Without waiting, many tensors are read before the first is written.
        stack = jax.block_until_ready(filled)
    return stack


def _read_quantized(
    path: str, parts: list[Entry], quant: QuantConfig | None, dtype: Any
) -> QuantizedTensor:
    """A kernel, or a stack of them, that bitsandbytes quantized; they stay as they are."""
    if not is_kernel(path):
        raise InputError(
            f"{parts[0].file}: {parts[0].key} is in four bits, which only kernels may be; keep it"
            " dense"
        )
    if quant is not None:
        raise InputError(
            f"{parts[0].file}: {parts[0].key} is in four bits already; leave quant out"
        )
    if dense := [part for part in parts if part.state is None]:
        raise InputError(
            f"{dense[0].file}: {dense[0].key} is not quantized, but {parts[0].key} or another layer"
            " of its stack is; quantize all layers alike, or none"
        )
    if stack_of(path, (STACKED,)) is None:
        return dataclasses.replace(parts[0].read_quantized(), dtype=dtype)
    stack: Any = None
    for i, part in enumerate(parts):
        layer = dataclasses.replace(part.read_quantized(), dtype=dtype)
        stack = _stack_of_zeros(layer, len(parts)) if stack is None else stack
        if jax.tree.structure(layer) != jax.tree.structure(stack):
            raise InputError(
                f"{part.file}: {part.key} is quantized otherwise than {parts[0].key}; quantize all"
                " layers alike"
            )
        stack = jax.block_until_ready(_fill(stack, layer, i, transpose=False, quant=None))
    return stack


@functools.partial(jax.jit, static_argnames=("transpose", "quant"), donate_argnums=0)
def _fill(stack: Any, tensor: Any, i: Any, *, transpose: bool, quant: QuantConfig | None) -> Any:
    """Write one layer into a stack, in place."""
    layer = tensor.T if transpose else tensor
    if quant is not None:
        layer = _quantized(layer, quant, contracting=1, dtype=stack.dtype)
    return jax.tree.map(lambda s, x: s.at[i].set(x.astype(s.dtype)), stack, layer)


@functools.partial(jax.jit, static_argnames=("quant", "contracting", "dtype"))
def _quantized(tensor: Any, quant: QuantConfig, *, contracting: Any, dtype: Any) -> QuantizedTensor:
    """Quantized from the file's own precision, whatever type it opens to."""
    return dataclasses.replace(quantize(tensor, quant, contracting=contracting), dtype=dtype)


def _stack_of_zeros(layer: Any, layers: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((layers, *np.shape(x)), x.dtype), layer)


def _read_finite(part: Entry) -> np.ndarray:
    """A tensor that is to be quantized; NaN and infinity are refused by its name."""
    tensor = part.read()
    if not np.isfinite(tensor).all():
        raise InputError(
            f"{part.file}: {part.key} holds weights that are not finite, which cannot be"
            " quantized; the file is damaged, copy it again"
        )
    return tensor
