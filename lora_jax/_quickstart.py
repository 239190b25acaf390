"""The quickstart: train, measure fairly, merge, compare, and show it in plain words."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import InputError
from ._files import atomic_directory, atomic_file
from ._program import PROGRAM
from ._tree import combine
from ._typing import Array, Params
from .data import (
    Example,
    docstring_rows,
    eval_batches,
    natural_prompt,
)
from .lora import merge_adapter
from .models import load_pretrained, save_pretrained
from .report import read_run, write_report
from .train import (
    Job,
    Result,
    RunConfig,
    evaluate,
    make_eval_step,
    next_directory,
    prepare,
    run,
    with_output,
)

Say = Callable[[str], None]


def quickstart(config: RunConfig, say: Say, listener: Any = None) -> Path:
    """Run a config and what follows it; gives the directory of everything it left.

    Args:
        config: A run on rows of the standard library (`data.train: stdlib`).
        say: Called with a line of text for the reader.
        listener: Watches the training, as in `train`.

    Returns:
        The run's directory: `base/`, `adapter/`, `merged/`, `metrics.jsonl`, `loss.png`,
        `report.md`, `config.yaml`, `summary.json`.
    """
    if (config.data.train, config.data.eval) != ("stdlib", "stdlib-heldout"):
        raise InputError(
            "quickstart: compares with the docstrings of the standard library, so data.train must"
            f" be stdlib and data.eval stdlib-heldout; use {PROGRAM} train for other rows"
        )
    if config.train.method != "lora":
        raise InputError(f"quickstart: shows an adapter; use {PROGRAM} train for train.method full")
    config = with_output(config, next_directory(config.output))
    job = prepare(config)
    counts = job.counts()
    say(_introduction(job, counts))
    scorer = SentenceLoss(job)
    fair = {"instruction": scorer.instruction(job.params), "natural": scorer.natural(job.params)}
    fair["before"] = min(fair.values())
    say(
        f"Before training: {fair['instruction']:.3f} nats per token when asked,"
        f" {fair['natural']:.3f} where a docstring naturally stands; the better one counts."
    )

    result = run(job, listener=listener)
    params = combine(job.base, result.trainable)
    fair["after"] = scorer.instruction(params)
    say(
        f"After training: {fair['after']:.3f} nats per token on modules it has never seen"
        f" ({100 * (fair['after'] / fair['before'] - 1):+.1f} %)."
    )
    merge = _merge_and_compare(job, result, params)
    say(
        f"Merged, saved and read back: logits differ by {merge['largest_difference']:.1e} of the"
        " largest."
    )
    _write_summary(result.directory, fair, merge)
    found = read_run(result.directory)
    write_report(found)
    for sample in found.samples:
        say(_in_words(sample))
    return result.directory


class SentenceLoss:
    """Mean loss of the held-out sentences' own tokens, asked for in two ways."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.step = make_eval_step(job.model, chunk=job.config.train.loss_chunk)
        self.rows = docstring_rows(held_out=True)

    def instruction(self, params: Params) -> float:
        """Asked for by the instruction prompt, as in training."""
        return self._loss(params, [_without_end(e) for e in self.job.eval])

    def natural(self, params: Params) -> float:
        """As the docstring of the function, right below its header."""
        tokenizer, examples = self.job.pretrained.tokenizer, []
        for asked in self.job.eval:
            row = self.rows[asked.row]
            answer = asked.input_ids[asked.loss_mask][:-1]
            bos = [tokenizer.bos_id] if tokenizer.add_bos else []
            prompt = [*bos, *tokenizer.encode(natural_prompt(row["input"]))]
            ids = np.concatenate([np.asarray(prompt, np.int32), answer])
            mask = np.arange(len(ids)) >= len(prompt)
            if len(ids) <= self.job.config.data.seq_length:
                examples.append(Example(ids, mask, asked.row))
        return self._loss(params, examples)

    def _loss(self, params: Params, examples: Sequence[Example]) -> float:
        c = self.job.config
        batches = eval_batches(
            dataclasses.replace(self.job.eval, examples=tuple(examples)),
            batch_size=c.train.batch_size,
            seq_length=c.data.seq_length,
        )
        return evaluate(self.step, params, batches).loss


def _without_end(example: Example) -> Example:
    """The end of turn is learnt too, but has no counterpart in a docstring: not scored."""
    mask = example.loss_mask.copy()
    mask[np.flatnonzero(mask)[-1]] = False
    return dataclasses.replace(example, loss_mask=mask)


def _merge_and_compare(job: Job, result: Result, params: Params) -> dict[str, Any]:
    """Write `base/` and `merged/`, read `merged/` back, and compare the logits of both."""
    source, directory = job.pretrained, result.directory
    with atomic_directory(directory / "base") as temporary:
        shutil.copytree(source.directory, temporary, dirs_exist_ok=True)
    # Into the dequantized base: quantizing a merged weight again would round the adapter away.
    merged = merge_adapter(job.base, result.trainable, layouts=job.layouts, dtype=jnp.float32)
    save_pretrained(
        directory / "merged", merged, source.config, dtype="float32", tokenizer=source.tokenizer
    )
    reloaded = load_pretrained(directory / "merged")
    batch = next(
        eval_batches(
            job.eval,
            batch_size=job.config.train.batch_size,
            seq_length=job.config.data.seq_length,
        )
    )
    inputs = [jnp.asarray(batch[name]) for name in ("input_ids", "positions", "segment_ids")]
    unmerged = jax.jit(lambda p: job.model.apply({"params": p}, *inputs))(params)
    again = jax.jit(lambda p: reloaded.module.apply({"params": p}, *inputs))(reloaded.params)
    return _compare(unmerged, again, batch["segment_ids"] > 0)


def _compare(expected: Array, found: Array, real: np.ndarray) -> dict[str, Any]:
    """The largest difference of logits at real tokens, over the largest logit."""
    wanted = np.asarray(expected)[real]
    largest = float(np.abs(wanted).max())
    difference = float(np.abs(wanted - np.asarray(found)[real]).max())
    return {
        "largest_difference": difference / largest,
        "largest_logit": largest,
        "tokens": int(real.sum()),
    }


def _introduction(job: Job, counts: dict[str, int]) -> str:
    c, report = job.config, job.train.report
    ranks = sorted({rank for target in job.targets for rank in target.ranks if rank})
    return (
        f"Base {c.model.path}: {counts['frozen']:,} frozen parameters in"
        f" {counts['frozen_bytes'] / 1e6:.1f} MB ({c.quant.format if c.quant else 'dense'}).\n"
        f"Adapter of rank {', '.join(map(str, ranks))}: {counts['trainable']:,} trainable"
        f" parameters, {100 * counts['trainable'] / counts['frozen']:.1f} % of the base.\n"
        f"{report.rows:,} rows to train on ({report.tokens:,} tokens, {report.trained_tokens:,}"
        f" of them trained on), {job.eval.report.rows} held-out rows to measure on."
    )


def _in_words(sample: dict[str, Any]) -> str:
    header = next((x for x in sample["prompt"].split("\n") if "def " in x), sample["prompt"])
    return (
        f"\n{header.strip()}\n"
        f"  before:   {' '.join(sample['before'].split()) or '(nothing)'}\n"
        f"  after:    {' '.join(sample['after'].split()) or '(nothing)'}\n"
        f"  expected: {sample['expected']}"
    )


def _write_summary(directory: Path, fair: dict[str, float], merge: dict[str, Any]) -> None:
    with atomic_file(directory / "summary.json") as temporary:
        summary = json.dumps({"fair": fair, "merge": merge}, indent=2)
        temporary.write_text(f"{summary}\n", encoding="utf-8")
