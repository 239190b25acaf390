"""`run.json`: what a run says of itself beside its metrics, for whoever reads it later."""

import dataclasses
import datetime
import functools
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._files import atomic_file
from .._tree import leaves_with_path
from .._typing import Array
from ..data import Example, Examples, digest_of, trained_spans
from ..quant import QuantizedTensor
from ._hosts import is_first, whole
from ._job import Job
from ._mesh import device_memory
from ._watch import alone

ABOUT_FILE = "run.json"
_PACKAGES = ("lora_jax", "jax", "jaxlib", "flax", "optax", "numpy")
_ROWS = 3
"""Training rows that are kept to be shown."""
_LONGEST = 2000
"""Characters of a row, of which a report shows no more."""


def write_start(job: Job, directory: Path, step: int, batches: int) -> None:
    """Write what is known when a run starts, or goes on: every start is kept.

    Args:
        job: The run.
        directory: Its directory.
        step: That it starts from.
        batches: Batches of an epoch.
    """
    norms = kernel_norms(job)  # together with the other processes
    if not is_first():
        return
    c = job.config
    about = {
        "counts": job.counts(),
        "targets": sorted({name for t in job.targets for name in t.names}),
        "attention": job.pretrained.attention_path,
        "data": {
            "train": {
                **_told(job.train),
                "places": batches * c.train.batch_size * c.data.seq_length,
            },
            "eval": _told(job.eval),
            "rows": [_row(example, job) for example in job.train.examples[:_ROWS]],
        },
        "base_norms": norms,
        "starts": [*_starts(directory), _start(step)],
    }
    _write(directory, about)


def write_end(directory: Path, step: int, *, early: bool) -> None:
    """Add that the run has ended, when, and whether `patience` ended it."""
    ended = {"time": _now(), "step": step, "early": early}
    if is_first():
        _write(directory, {**read_kept(directory / ABOUT_FILE), "ended": ended})


def kernel_norms(job: Job) -> dict[str, float]:
    """Frobenius norm of every adapted kernel of the base, by its module's dotted name.

    Experts are left out, and so is a base that the adapter's start has moved: what the adapter's
    file adds to is the base before. All processes call this alike; the first alone is told.
    """
    if job.config.lora.moves_base and job.config.train.adapter is None:
        return {}
    leaves = dict(leaves_with_path(job.base))
    targets = [t for t in job.targets if t.experts is None]
    found = whole([_norms(leaves[t.path], t.stacked) for t in targets])
    if not is_first():  # who alone is given what others hold parts of
        return {}
    return {
        name.replace("/", "."): float(norm)
        for target, norms in zip(targets, found, strict=True)
        for name, norm in zip(target.names, np.atleast_1d(np.asarray(norms)), strict=True)
    }


@functools.partial(jax.jit, static_argnums=1)
def _norms(kernel: Any, stacked: bool) -> Array:
    def norm(one: Any) -> Array:
        dense = one.unbox() if isinstance(one, QuantizedTensor) else one
        return jnp.sqrt(jnp.sum(jnp.square(dense.astype(jnp.float32))))

    # A layer at a time, so that only one of a quantized stack is dense.
    return jax.lax.map(norm, kernel) if stacked else norm(kernel)


def _told(examples: Examples) -> dict[str, Any]:
    return {
        **dataclasses.asdict(examples.report),
        "template": examples.template,
        "digest": digest_of(examples),
    }


def _row(example: Example, job: Job) -> dict[str, Any]:
    """A row as it is trained on: where it stands, and its text in stretches, masked or not."""
    tokenizer = job.pretrained.tokenizer
    assert tokenizer is not None
    spans, room = [], _LONGEST
    for text, trained in trained_spans(example, tokenizer):
        spans.append([text if len(text) <= room else text[:room] + "…", trained])
        room -= len(text)
        if room <= 0:
            break
    return {"where": job.places.get(example.row, ""), "tokens": len(example), "spans": spans}


def _start(step: int) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "time": _now(),
        "step": step,
        "command": _command(sys.argv),
        "versions": {"python": platform.python_version(),
                     **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "devices": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
            "device_bytes": device_memory(),
            "processes": jax.process_count(),
        },
    }  # fmt: skip


def _command(words: Sequence[str]) -> str:
    """What was typed, as far as Python knows."""
    program = Path(words[0])
    ours = program.name == "lora" or program.parent.name == "lora_jax"
    begin = "./lora" if ours else f"python {shlex.quote(program.name)}"
    return " ".join([begin, *map(shlex.quote, words[1:])])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its sources
        return None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _starts(directory: Path) -> list[Any]:
    starts = read_kept(directory / ABOUT_FILE).get("starts")
    return starts if isinstance(starts, list) else []


def read_kept(path: Path) -> dict[str, Any]:
    """What a file holds of keys and values: nothing where it is missing or broken.

    What a run tells beside its results must not end it.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(directory: Path, about: dict[str, Any]) -> None:
    with alone(f"writing {ABOUT_FILE}"), atomic_file(directory / ABOUT_FILE) as temporary:
        temporary.write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
