"""Starts of an adapter that look at the first batches of a run's data."""

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._config import LoraConfig
from .._typing import Array, Params
from ..adapters import init_corda, init_eva, init_lora_ga
from ..data import BatchIterator, Examples, batch_iterator
from ..lora import OUTPUT_HEADS, find_targets
from ..models import Pretrained
from ..transform import LoraLinen, lora_linen
from ._config import RunConfig
from ._step import batch_loss


def training_batches(
    config: RunConfig,
    examples: Examples,
    pretrained: Pretrained,
    own_rows: Collection[int] | None = None,
) -> BatchIterator:
    """The training batches of a run, from their beginning; see `batch_iterator`."""
    assert pretrained.tokenizer is not None
    return batch_iterator(
        examples,
        batch_size=config.train.batch_size,
        seq_length=config.data.seq_length,
        packing=config.data.packing,
        seed=config.train.seed,
        pad_id=pretrained.tokenizer.pad_id or 0,
        own_rows=own_rows,
    )


def start_from_data(
    config: RunConfig, pretrained: Pretrained, examples: Examples
) -> tuple[Params, dict[str, Any], LoraConfig]:
    """The base, the adapter and its config by the start that `lora.init_lora_weights` names.

    The same config, files and machine give the same start again, as a run that goes on needs.

    Raises:
        InputError: as `init_eva`, `init_corda`, `init_lora_ga`.
    """
    lora, layouts, params = config.lora, pretrained.layouts, pretrained.params
    model, batches = lora_linen(pretrained.module), _first_batches(config, examples, pretrained)
    if lora.init_lora_weights == "lora_ga":
        key = jax.random.key(config.train.seed)
        loss = _mean_loss(model, config.train.loss_chunk)
        return *init_lora_ga(loss, params, lora, batches, key=key, layouts=layouts), lora
    with_head = any(
        target.path.split("/")[0] in OUTPUT_HEADS
        for target in find_targets(params, lora, layouts=layouts)
    )
    forward = _forward(model, with_head)
    if lora.init_lora_weights == "corda":
        return *init_corda(forward, params, lora, batches, layouts=layouts), lora
    return init_eva(forward, params, lora, batches, layouts=layouts)


def _first_batches(
    config: RunConfig, examples: Examples, pretrained: Pretrained
) -> Iterator[dict[str, Array]]:
    """The first batches of the run, none twice."""
    batches = training_batches(config, examples, pretrained)
    count = min(config.train.start_batches, batches.batches_per_epoch)
    for batch in itertools.islice(batches, count):
        yield {name: jnp.asarray(x) for name, x in batch.items() if name != "rows"}


def _forward(model: LoraLinen, with_head: bool) -> Callable[[Params, Any], Array]:
    """The last hidden states; the logits only if the head is watched too."""

    def forward(params: Params, batch: Any) -> Array:
        inputs = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        if with_head:
            return model.apply({"params": params}, *inputs)
        return model.apply({"params": params}, *inputs, method="hidden_states")[0]

    return forward


def _mean_loss(model: LoraLinen, chunk: int) -> Callable[[Params, Any], Array]:
    def loss(params: Params, batch: Any) -> Array:
        total, tokens = batch_loss(model, params, batch, chunk)
        return total / jnp.maximum(tokens, 1)

    return loss
