"""What `./lora evaluate` does: the loss, answers that are numbers, or the harness."""

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._errors import InputError
from .evaluate import (
    Accuracy,
    HeldOutLosses,
    RowLosses,
    Subject,
    answer_rows,
    harness_model,
    run_harness,
)

_GSM8K = {"instruction": "question", "output": "answer"}
_OF_HARNESS, _OF_ANSWERS = ("include_path", "limit", "shots", "chat"), ("max_new_tokens",)


def evaluate(options: argparse.Namespace, overrides: list[str]) -> tuple[str, Mapping[str, Any]]:
    """The result as text and as what JSON holds.

    Raises:
        InputError: for options that do not go together, and whatever does not fit the files.
    """
    _check(options)
    subject = _subject(options, overrides)
    if options.harness:
        return _run_tasks(subject, options)
    if options.exact_match:
        return _answer(subject, options)
    losses = subject.losses()
    return _show_losses(losses), _plain_losses(losses)


def _check(o: argparse.Namespace) -> None:
    if (o.run is None) == (o.model is None):
        raise InputError("lora evaluate: give a run's directory, or --model DIR")
    if o.run is not None and (o.adapter or o.data):
        other = "--adapter" if o.adapter else "--data"
        raise InputError(f"lora evaluate: a run has its own {other[2:]}; leave {other} out")
    if o.model is not None and bool(o.data) == bool(o.harness):
        raise InputError("lora evaluate: with --model give --data FILE, or --harness TASKS")
    if o.harness and o.exact_match:
        raise InputError("lora evaluate: --exact-match and --harness are two evaluations; give one")
    idle = (() if o.harness else _OF_HARNESS) + (() if o.exact_match else _OF_ANSWERS)
    for name in idle:
        if getattr(o, name) is not None:
            needs = "--exact-match" if name in _OF_ANSWERS else "--harness"
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"lora evaluate: {flag} goes with {needs}; leave it out")


def _subject(o: argparse.Namespace, overrides: list[str]) -> Subject:
    batch = [] if o.batch_size is None else [f"--train.batch_size={o.batch_size}"]
    if o.run is not None:
        return Subject.of_run(o.run, [*overrides, *batch])
    given = [word for word in overrides if word.startswith(("--data.columns", "--data.format"))]
    columns = _GSM8K if o.exact_match and not given else None
    return Subject.of_files(o.model, o.adapter, o.data, [*overrides, *batch], columns)


def _answer(subject: Subject, o: argparse.Namespace) -> tuple[str, Mapping[str, Any]]:
    rows, c = subject.rows(), subject.config
    quant = None if c.quant is None else c.quant.format
    found = answer_rows(
        subject.text_model(),
        rows,
        Path(o.exact_match),
        template=c.data.template,
        max_new_tokens=256 if o.max_new_tokens is None else o.max_new_tokens,
        batch_size=c.train.batch_size,
        settings={"model": c.model.path, "quant": quant, "trained": _fingerprint(subject)},
        tell=_tell,
    )
    lines = [f"{name:8} {_show_accuracy(accuracy)}" for name, accuracy in found.items()]
    plain = {name: _plain_accuracy(accuracy) for name, accuracy in found.items()}
    return "\n".join([*lines, f"records in {o.exact_match}"]), {**plain, "records": o.exact_match}


def _tell(done: int, of: int) -> None:
    """One line to whoever waits, beside the result and not in it."""
    print(f"{done:,} of {of:,} rows answered", file=sys.stderr, flush=True)


def _run_tasks(subject: Subject, o: argparse.Namespace) -> tuple[str, Mapping[str, Any]]:
    lm = harness_model(subject.text_model(), batch_size=subject.config.train.batch_size)
    names = o.harness.split(",")
    found = run_harness(
        lm, names, directory=o.include_path, limit=o.limit, shots=o.shots, chat=bool(o.chat)
    )
    lines = [
        f"{task}: {metric} {value:.4f}" if isinstance(value, float) else f"{task}: {metric} {value}"
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    return "\n".join(lines), found


def _fingerprint(subject: Subject) -> str | None:
    """The directory of what was trained, and its bytes: another training is another model."""
    if subject.trained is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(subject.trained).glob("*.safetensors")):
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{subject.trained} {digest.hexdigest()[:16]}"


def _show_losses(losses: HeldOutLosses) -> str:
    base, trained, difference = losses.base, losses.trained, losses.difference
    size = f"{len(base.nats):,} rows, {base.tokens.sum():,} trained tokens"
    if trained is None or difference is None:
        return f"{_show_loss(base)}; {size}"
    return (
        f"base       {_show_loss(base)}\ntrained    {_show_loss(trained)}\n"
        f"difference {difference.loss:+.4f}{_error(difference.standard_error)}; {size}"
    )


def _show_loss(losses: RowLosses) -> str:
    error = _error(losses.standard_error)
    return f"loss {losses.loss:.4f}{error} nats per token, perplexity {losses.perplexity:.2f}"


def _show_accuracy(accuracy: Accuracy) -> str:
    share, error = accuracy.share, _error(accuracy.standard_error)
    return f"{share:.4f}{error} ({accuracy.correct:,} of {accuracy.rows:,})"


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.4f}"


def _plain_losses(losses: HeldOutLosses) -> dict[str, Any]:
    named = {"base": losses.base, "trained": losses.trained}
    plain: dict[str, Any] = {
        name: {
            "loss": found.loss,
            "standard_error": found.standard_error,
            "perplexity": found.perplexity,
        }
        for name, found in named.items()
        if found is not None
    }
    if losses.difference is not None:
        d = losses.difference
        plain["difference"] = {"loss": d.loss, "standard_error": d.standard_error}
    rows, tokens = len(losses.base.nats), int(losses.base.tokens.sum())
    return {**plain, "rows": rows, "tokens": tokens}


def _plain_accuracy(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": accuracy.share,
        "standard_error": accuracy.standard_error,
        "correct": accuracy.correct,
        "rows": accuracy.rows,
    }
