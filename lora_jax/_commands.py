"""What the smaller commands do: evaluate, merge, look at rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._errors import InputError
from ._quant_config import QuantConfig
from ._tree import combine
from ._typing import Params
from .adapters import load_adapter
from .data import (
    Examples,
    Rows,
    eval_batches,
    read_rows,
)
from .lora import merge_adapter
from .models import Pretrained, load_pretrained, save_pretrained
from .train import (
    Evaluation,
    ModelSection,
    RunConfig,
    adapter_notes,
    evaluate,
    examples_of,
    load_base,
    make_eval_step,
    run_config,
    with_length,
)
from .transform import lora_linen


def evaluate_rows(raw: dict[str, Any], overrides: list[str], adapter: str | None) -> Evaluation:
    """Loss of a model, with or without an adapter, on the rows of `data.train`."""
    config = run_config(raw, overrides, "evaluate")
    pretrained = load_base(config.model, config.quant)
    params = with_adapter(pretrained, adapter)
    if adapter is not None and config.data.template == "auto":
        template = adapter_notes(adapter).get("template", "auto")
        data = dataclasses.replace(config.data, template=template)
        config = dataclasses.replace(config, data=data)
    return _measure(config, pretrained)(params)


def loss_on(
    pretrained: Pretrained, data: str, overrides: list[str]
) -> Callable[[Params], Evaluation]:
    """A function from parameters of this model to their loss on the rows of a file."""
    raw = {"data": {"train": data}, "output": "runs/inspect"}
    return _measure(run_config(raw, overrides, "inspect"), pretrained)


def _measure(config: RunConfig, pretrained: Pretrained) -> Callable[[Params], Evaluation]:
    data = with_length(config.data, pretrained)
    examples = examples_of(_rows(config), data, pretrained)
    step = make_eval_step(lora_linen(pretrained.module), chunk=config.train.loss_chunk)

    def measure(params: Params) -> Evaluation:
        batches = eval_batches(
            examples,
            batch_size=config.train.batch_size,
            seq_length=data.seq_length,
            packing=data.packing,
        )
        return evaluate(step, params, batches)

    return measure


def rows_and_examples(config: RunConfig) -> tuple[Rows, Examples, Any]:
    """The rows of `data.train`, their tokens, and the tokenizer; no weights are read."""
    from .train import load_tokenizer

    rows = _rows(config)
    pretrained = load_tokenizer(config.model)
    data = with_length(config.data, pretrained)
    return rows, examples_of(rows, data, pretrained), pretrained.tokenizer


def with_adapter(pretrained: Pretrained, adapter: str | None) -> Params:
    """The base's parameters, with the adapter of a directory laid over them."""
    if adapter is None:
        return pretrained.params
    loaded, _ = load_adapter(adapter, pretrained.params, layouts=pretrained.layouts)
    return combine(pretrained.params, loaded)


def merge_directories(model: str, adapter: str, output: str, dtype: str, quant: str | None) -> str:
    """Merge, save, read back and compare; gives a line that says by how much they differ.

    Raises:
        InputError: if the output holds something, or the adapter is of another base.
    """
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{output}: holds something already; give an empty directory")
    config = QuantConfig(format=quant) if quant else None  # type: ignore[arg-type]
    base = load_base(ModelSection(path=model), config)
    loaded, _ = load_adapter(adapter, base.params, layouts=base.layouts)
    merged = merge_adapter(base.params, loaded, layouts=base.layouts, dtype=jnp.float32)
    save_pretrained(output, merged, base.config, dtype=dtype, tokenizer=base.tokenizer)
    again = load_pretrained(output)
    length = min(64, base.config.max_position_embeddings)
    probe = jnp.asarray(np.arange(length)[None] % base.config.vocab_size)
    wrapped = lora_linen(base.module)
    expected = wrapped.apply({"params": combine(base.params, loaded)}, probe)
    found = again.module.apply({"params": again.params}, probe)
    difference = float(jnp.abs(expected - found).max() / jnp.abs(expected).max())
    return (
        f"{output}: merged in {dtype}; read back, its logits differ from base and adapter by"
        f" {difference:.1e} of the largest"
    )


def _rows(config: RunConfig) -> Rows:
    data = config.data
    return read_rows(
        data.train,
        format=data.format,
        columns=data.columns,
        limit=data.train_rows,
        bad_rows=data.bad_rows,
    )
