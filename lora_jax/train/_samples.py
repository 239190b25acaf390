"""`samples.json`: the same held-out prompts answered before a run and after it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._errors import first_line
from .._files import atomic_file
from .._tokenizer import Tokenizer
from .._typing import Params
from ..data import Example
from ..models import generate
from ._about import read_kept
from ._hosts import is_first
from ._job import Job
from ._tokens import stopping_config
from ._watch import alone

SAMPLES_FILE = "samples.json"
NEW_TOKENS = 48
_LONGEST = 256
"""Tokens of a prompt: more would be slow to answer, and nobody would read them."""


def answer_before(job: Job, params: Params, directory: Path) -> None:
    """Choose prompts, answer them with the model as it is, and keep both.

    Where answering is not possible, the file says why.
    """
    if not job.config.train.samples:
        return
    chosen = _chosen(job)
    why = None if chosen else "no held-out prompt leaves room for an answer"
    if job.mesh is not None:
        chosen, why = [], "a model on several devices is not asked while it is trained"
    try:
        answers = _answers(job, params, chosen)
    except jax.errors.JaxRuntimeError as error:  # full memory, say: the steps may fit all the same
        chosen, answers, why = [], [], first_line(error)
    tokenizer = job.pretrained.tokenizer
    assert tokenizer is not None
    samples = [
        {
            "row": example.row,
            "prompt": tokenizer.decode(_prompt(example)),
            "expected": _beginning(_answer(example), tokenizer),
            "before": answer,
        }
        for example, answer in zip(chosen, answers, strict=True)
    ]
    _write(directory, {"samples": samples, "left_out": why})


def answer_after(job: Job, params: Params, directory: Path) -> None:
    """Add what the model answers now to the file that `answer_before` has left.

    A file that is broken, or asks something else, is left as it is.
    """
    kept = read_kept(directory / SAMPLES_FILE)
    samples = kept.get("samples")
    if not isinstance(samples, list) or not all(isinstance(own, dict) for own in samples):
        return
    chosen = _chosen(job) if samples else []
    if not chosen or [own.get("row") for own in samples] != [example.row for example in chosen]:
        return
    try:
        answers = _answers(job, params, chosen)
    except jax.errors.JaxRuntimeError as error:
        _write(directory, {"samples": [], "left_out": first_line(error)})
        return
    answered = [{**own, "after": answer} for own, answer in zip(samples, answers, strict=True)]
    _write(directory, {**kept, "samples": answered})


def _chosen(job: Job) -> list[Example]:
    """Held-out examples at even distances, of those with a short prompt."""
    room = min(_LONGEST, job.pretrained.config.context_length - NEW_TOKENS)
    short = [e for e in job.eval if 0 < len(_prompt(e)) <= room]
    count = job.config.train.samples
    return short[:: max(len(short) // count, 1)][:count]


def _prompt(example: Example) -> np.ndarray:
    """What stands before the first answer; of a text, which is all answer, its first half."""
    start = int(np.flatnonzero(example.loss_mask)[0])
    return example.input_ids[: start if start > 1 else len(example) // 2]


def _answer(example: Example) -> np.ndarray:
    """What follows the prompt, up to what others say next."""
    start = len(_prompt(example))
    others = np.flatnonzero(~example.loss_mask[start:])
    return example.input_ids[start:][: others[0] if len(others) else None]


def _beginning(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """A text, up to as many tokens as the model may answer with."""
    text = tokenizer.decode(ids[:NEW_TOKENS]).strip()
    return f"{text}…" if len(ids) > NEW_TOKENS else text


def _answers(job: Job, params: Params, examples: Sequence[Example]) -> list[str]:
    tokenizer = job.pretrained.tokenizer
    assert tokenizer is not None
    ids = generate(
        job.model,
        params,
        [_prompt(example).tolist() for example in examples],
        max_new_tokens=NEW_TOKENS,
        eos_ids=stopping_config(job.pretrained, job.train.template).eos_token_ids,
        pad_id=tokenizer.pad_id or 0,
    )
    return [tokenizer.decode(new).strip() for new in ids]


def _write(directory: Path, kept: dict[str, Any]) -> None:
    if not is_first():
        return
    with alone(f"writing {SAMPLES_FILE}"), atomic_file(directory / SAMPLES_FILE) as temporary:
        temporary.write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")
