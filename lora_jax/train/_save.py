"""What a run leaves: an adapter in PEFT's format, or a model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from .._files import atomic_directory
from ..adapters import save_adapter, write_notes
from ..lora import without_start
from ..models import save_pretrained
from ._hosts import once, whole
from ._job import Job
from ._tokens import stopping_config


def save_result(job: Job, directory: Path, trainable: dict[str, Any]) -> None:
    """Write what a job has trained: `adapter/` in PEFT's format, or `model/`."""
    trainable = whole(trainable)
    if job.config.train.method == "lora":
        job = dataclasses.replace(job, trainable=whole(job.trainable))
        once(lambda: _save_adapter(job, directory, trainable))
    else:
        once(lambda: _save_model(job, directory, trainable))


def _save_adapter(job: Job, directory: Path, adapter: dict[str, Any]) -> None:
    lora = job.lora
    if lora.init_lora_weights == "loftq":
        # Over the base as `quant` gives it, which the first iteration leaves as it is.
        lora = lora.with_usual_start()
    elif lora.moves_base:
        adapter, lora = without_start(adapter, job.trainable, lora)
    with atomic_directory(directory / "adapter") as temporary:
        save_adapter(
            temporary,
            adapter,
            lora,
            layouts=job.layouts,
            base_model=job.config.model.path,
        )
        tokenizer = job.pretrained.tokenizer
        write_notes(temporary, template=job.train.template, add_tokens=tokenizer.added)
        if tokenizer.added:  # Another base would need them to know which texts the rows are of.
            tokenizer.save(temporary)


def _save_model(job: Job, directory: Path, params: dict[str, Any]) -> None:
    save_pretrained(
        directory / "model",
        params,
        stopping_config(job.pretrained, job.train.template),
        dtype=str(jax.tree.leaves(params)[0].dtype),
        tokenizer=job.pretrained.tokenizer,
    )
