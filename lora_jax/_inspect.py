"""What quantization does to a model: the error of every layer, and what it costs in loss."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import InputError, nearest
from ._names import is_kernel, stack_of
from ._quant_config import QuantConfig
from ._tree import layer_paths, leaves_with_path, map_with_path
from ._typing import Params
from .evaluate import measure_on
from .models import Pretrained
from .quant import QuantizationError, QuantizedTensor, quantization_error, quantize
from .train import ModelSection, load_base, run_config, training_rows

FORMATS: Mapping[str, QuantConfig] = {
    "nf4": QuantConfig("nf4"),
    "fp4": QuantConfig("fp4"),
    "int4": QuantConfig("int4"),
    "int4-zero": QuantConfig("int4", zero_point=True),
    "int8": QuantConfig("int8"),
}
"""The formats that are compared, by the name of their column."""


def inspect_quantization(
    model: str, formats: str | None, data: str | None, overrides: list[str]
) -> Iterator[str]:
    """Lines of a table: every layer's error under each format, then the loss under each.

    Args:
        model: Directory of a model, or `bundled`.
        formats: Names of `FORMATS` to compare, with commas between; all by default.
        data: Held-out rows to measure the loss on; without it only the errors are told.
        overrides: `--data.key value` and the like.

    Raises:
        InputError: for whatever does not fit the files.
    """
    chosen = _named(formats)
    base = load_base(ModelSection(path=model))
    kernels = {p: leaf for p, leaf in leaves_with_path(base.params) if in_block(p, base.stacked)}
    if any(isinstance(kernel, QuantizedTensor) for kernel in kernels.values()):
        raise InputError(f"{model}: is in four bits already; give the float checkpoint")
    width = max(len(name) for p in kernels for name in _layers(p, kernels[p], base.stacked))
    yield _line("error", [""] + [f"{name:>13}" for name in chosen], width)
    yield _line("", [" outliers"] + ["   rms  worst"] * len(chosen), width)
    for path, kernel in kernels.items():
        errors = [_error(kernel, config) for config in chosen.values()]
        for i, name in enumerate(_layers(path, kernel, base.stacked)):
            at = [QuantizationError(*(np.reshape(x, -1)[i] for x in e)) for e in errors]
            cells = [f"{100 * at[0].outliers:8.4f}%"]
            yield _line(name, cells + [f"{e.rms:.4f} {e.worst:.4f}" for e in at], width)
    if data is None:
        yield "give --data FILE to see what each format does to the held-out loss"
        return
    yield from _losses(base, chosen, data, overrides)


def _named(formats: str | None) -> Mapping[str, QuantConfig]:
    names = list(FORMATS) if formats is None else formats.split(",")
    for name in names:
        if name not in FORMATS:
            raise InputError(
                f"--formats: there is no {name!r}{nearest(name, FORMATS)}; use {','.join(FORMATS)}"
            )
    return {name: FORMATS[name] for name in names}


def _losses(
    base: Pretrained, formats: Mapping[str, QuantConfig], data: str, overrides: list[str]
) -> Iterator[str]:
    raw = {"data": {"train": data}, "output": "runs/inspect"}
    config = run_config(raw, overrides, "inspect")
    measure = measure_on(config, training_rows(config.data), base)
    dense = measure(base.params)
    tokens = dense.tokens.sum()
    yield f"held-out loss {dense.loss:.4f} nats per token over {tokens:,} tokens, dense"
    for name, config in formats.items():
        loss = measure(quantized(base.params, base.stacked, config)).loss
        yield f"  {name:9} {loss:.4f} ({loss - dense.loss:+.4f})"


@functools.partial(jax.jit, static_argnums=1)
def _error(kernel: Any, config: QuantConfig) -> QuantizationError:
    return quantization_error(kernel, config)


def quantized(params: Params, stacked: tuple[str, ...], config: QuantConfig) -> Params:
    """The kernels of stacked layers in a format; everything else as it is."""

    def leaf(path: str, x: Any) -> Any:
        return (
            quantize(jnp.asarray(x), config, stacked=x.ndim - 2) if in_block(path, stacked) else x
        )

    return map_with_path(leaf, params)


def in_block(path: str, stacked: tuple[str, ...]) -> bool:
    return is_kernel(path) and stack_of(path, stacked) is not None


def _layers(path: str, kernel: Any, stacked: tuple[str, ...]) -> list[str]:
    """The modules behind a stacked kernel."""
    return layer_paths(path.rpartition("/")[0], stack_of(path, stacked), kernel.shape[0])


def _line(name: str, cells: list[str], width: int) -> str:
    return "  ".join([f"{name:{width}}", *cells])
