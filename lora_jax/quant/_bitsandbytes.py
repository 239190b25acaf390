"""Weights that bitsandbytes quantized, from the arrays of their file, without torch."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from ._codebook import CODEBOOKS, GROUP, dynamic_table
from ._tensor import QuantizedTensor

_DESCRIPTION = "quant_state.bitsandbytes__"
_OF_A_STATE = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_DTYPES = ("float32", "bfloat16", "float16")


def read_bitsandbytes(
    packed: np.ndarray, state: Mapping[str, np.ndarray], *, name: str = "weight"
) -> QuantizedTensor:
    """The kernel `(d_in, d_out)` behind a 4-bit weight `(d_out, d_in)` of bitsandbytes.

    Its values are kept as they are. Where blocks of bitsandbytes, which run along the flattened
    weight, do not end with a row, the result is `flat`.

    Args:
        packed: Two codes in each byte, the first one high; any dtype (`quant_storage`).
        state: The tensors saved beside it, by the rest of their name: `absmax`, `quant_map`,
            `quant_state.bitsandbytes__nf4` (or `fp4`) and, under double quantization,
            `nested_absmax` and `nested_quant_map`.
        name: The weight's name, for errors.

    Raises:
        InputError: if a tensor of the state is missing, or does not fit the others.

    Example:
        >>> told = dict(quant_type="nf4", blocksize=64, dtype="float32", shape=[2, 64])
        >>> told = np.frombuffer(json.dumps(told).encode(), np.uint8)
        >>> state = {"quant_state.bitsandbytes__nf4": told, "absmax": np.ones(2, np.float32),
        ...          "quant_map": np.float32(CODEBOOKS["nf4"])}
        >>> q = read_bitsandbytes(np.full((64, 1), 0xF7, np.uint8), state)
        >>> q.unbox()[:2].tolist()
        [[1.0, 1.0], [0.0, 0.0]]

    Source: Dettmers et al. 2023, "QLoRA", section 3; the file's layout is that of
    `bitsandbytes.functional.QuantState.as_dict(packed=True)`.
    """
    told = read_description(state, name)
    block, (d_out, d_in) = told["blocksize"], told["shape"]
    size = d_out * d_in
    blocks = -(-size // block)
    data = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
    if data.size != -(-size // 2):
        raise InputError(
            f"{name}: {data.size} bytes, but {told['shape']} in four bits takes {-(-size // 2)};"
            " the file is damaged, copy it again"
        )
    absmax, nested_scales, offset = _absmax(state, told, blocks, name)
    nibbles = np.stack([data >> 4, data & 15], axis=1).reshape(-1)[:size]
    flat = d_in % block != 0
    columns = blocks if flat else d_out
    # What pads the last block stands for zero.
    padding = np.full(blocks * block - size, CODEBOOKS[told["quant_type"]].index(0.0), np.uint8)
    rows = np.concatenate([nibbles, padding]).reshape(columns, -1, block).transpose(1, 2, 0)
    first, second = np.split(rows, 2, axis=1)
    return QuantizedTensor(
        codes=jnp.asarray((first << 4) | second),
        scales=jnp.asarray(absmax.reshape(columns, -1).T),
        zeros=None,
        nested_scales=None if nested_scales is None else jnp.asarray(nested_scales),
        offset=None if offset is None else jnp.asarray(offset, jnp.float32),
        format=told["quant_type"],
        block_size=block,
        kernel_shape=(d_in, d_out),
        contracting=(0,),
        dtype=jnp.dtype(told["dtype"]),
        flat=flat,
    )


def split_state(key: str) -> tuple[str, str] | None:
    """The weight that a tensor of a state belongs to, and its name there; None for others.

    Example:
        >>> split_state("lm_head.weight.absmax"), split_state("lm_head.weight")
        (('lm_head.weight', 'absmax'), None)
    """
    found = _OF_A_STATE.fullmatch(key)
    return (found[1], found[2]) if found else None


def read_description(state: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """What the weight is: `quant_type`, `blocksize`, `dtype`, `shape`, and of its absmax.

    Raises:
        InputError: if it is missing or not what bitsandbytes writes.
    """
    key = next((k for k in state if k.startswith(_DESCRIPTION)), f"{_DESCRIPTION}nf4")
    try:
        told = json.loads(bytes(_tensor(state, key, name).tobytes()))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{name}.{key}: not valid JSON ({error}); copy the file again") from None
    rules = {
        "quant_type": lambda v: v in ("nf4", "fp4"),
        "blocksize": lambda v: type(v) is int and 32 <= v <= 4096 and v % 2 == 0,
        "dtype": lambda v: v in _DTYPES,
        "shape": lambda v: (
            isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v)
        ),
    }
    for field, holds in rules.items():
        if not isinstance(told, dict) or not holds(told.get(field)):
            got = told.get(field) if isinstance(told, dict) else told
            raise InputError(
                f"{name}.{key}: {field} {got!r} is not supported; known: nf4 and fp4 matrices in"
                f" blocks of 32 to 4096, of {', '.join(_DTYPES)}"
            )
    return told


def _absmax(
    state: Mapping[str, np.ndarray], told: Mapping[str, Any], blocks: int, name: str
) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Scales, nested scales and offset."""
    codebook = np.asarray(CODEBOOKS[told["quant_type"]], np.float32)
    _check_table(_tensor(state, "quant_map", name), codebook, f"{name}.quant_map")
    absmax = _tensor(state, "absmax", name).reshape(-1)
    if absmax.size != blocks:
        raise InputError(
            f"{name}.absmax: {absmax.size} values for {blocks} blocks of {told['blocksize']}; the"
            " file is damaged, copy it again"
        )
    if told.get("nested_blocksize") is None:
        return _finite(absmax.astype(np.float32), f"{name}.absmax"), None, None
    nested = _tensor(state, "nested_absmax", name).reshape(-1).astype(np.float32)
    dynamic = _tensor(state, "nested_quant_map", name)
    _check_table(dynamic, dynamic_table(signed=True), f"{name}.nested_quant_map")
    size, offset = told["nested_blocksize"], told.get("nested_offset")
    fits = size == GROUP and nested.size == -(-blocks // GROUP) and absmax.dtype == np.uint8
    if not fits or not isinstance(offset, float) or not math.isfinite(offset):
        raise InputError(
            f"{name}: absmax {absmax.dtype} in {nested.size} groups of {size!r} with offset"
            f" {offset!r} is not supported; known: uint8 in groups of {GROUP}, and a mean"
        )
    return absmax, _finite(nested, f"{name}.nested_absmax"), offset


def _tensor(state: Mapping[str, np.ndarray], key: str, name: str) -> np.ndarray:
    if key not in state:
        raise InputError(
            f"{name}: {name}.{key} is missing, without which its four bits mean nothing; save the"
            " model again with bitsandbytes, or give the float checkpoint"
        )
    return state[key]


def _check_table(found: np.ndarray, known: np.ndarray, name: str) -> None:
    table = np.asarray(found, np.float32).reshape(-1)
    if table.shape != known.shape or not np.allclose(table, known, rtol=1e-6, atol=1e-7):
        raise InputError(f"{name}: not the values that bitsandbytes uses; it cannot be read")


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError(f"{name}: holds values that are not finite; copy the file again")
    return values
