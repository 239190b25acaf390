"""What a command shows: a live progress bar on a terminal, plain lines elsewhere."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .lora import target_report
from .train import Job, config_text, job_batches, steps_of


class TrainingProgress:
    """A listener that shows step, loss, tokens/s, time left and peak memory of a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        # Without a total the bar moves to and fro: measuring and compiling come first.
        self.task = self.bar.add_task("getting ready", total=None, words="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            self.console.print(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}")
        if "loss" not in record:
            return
        words = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s "
            f" peak {record['peak_memory_bytes'] / 1e9:.2f} GB"
        )
        step = f"step {record['step']}/{record['steps']}"
        self.bar.update(
            self.task,
            description=step,
            total=record["steps"],
            completed=record["step"],
            words=words,
        )
        if not self.console.is_terminal:
            left = self.bar.tasks[0].time_remaining
            eta = f"  ETA {left:.0f} s" if left else ""
            self.console.print(f"{step}  {words}{eta}")


class SweepProgress:
    """What shows how far a sweep is: a bar of adapters' steps, and a line for each one's end."""

    def __init__(self, console: Console, members: int) -> None:
        self.console, self.members, self.done = console, members, 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("getting ready", total=None)

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, record: dict[str, Any]) -> None:
        """A step of the adapters that are trained now."""
        at, steps = record["step"], record["steps"]
        description = f"{self.done} of {self.members} adapters, step {at}/{steps}"
        self.bar.update(self.task, description=description, total=steps, completed=at)

    def finished(self, record: dict[str, Any]) -> None:
        """An adapter is trained."""
        self.done += 1
        loss = record["loss"]
        told = "diverged" if loss is None else f"held-out loss {loss:.4f}"
        varied = ", ".join(f"{name} {value}" for name, value in record["varied"].items())
        line = f"{self.done} of {self.members}: {varied}: {told}"
        self.console.print(line, markup=False, highlight=False)


def human_bytes(count: float) -> str:
    """A count of bytes in powers of 1000.

    Example:
        >>> human_bytes(7_610_880)
        '7.61 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"


def describe_job(job: Job) -> str:
    """What a dry run prints: config, what is adapted and what not, counts, bytes, data, steps."""
    batches = job_batches(job)
    lines = [config_text(job.config).rstrip(), "", *_adapted(job)]
    lines.append(f"attention: {job.pretrained.attention_path}")
    for name, examples in (("training", job.train), ("held-out", job.eval)):
        report = examples.report
        lines.append(
            f"{name} rows: {report.rows:,}, {report.tokens:,} tokens, {report.trained_tokens:,}"
            f" trained on, {report.truncated} truncated, {sum(report.dropped.values())} dropped"
        )
    lines += [f"note: {note}" for note in job.notes]
    lines.append(
        f"steps: {steps_of(job.config, batches):,} ({batches.batches_per_epoch:,} batches an epoch)"
    )
    return "\n".join(lines)


def _adapted(job: Job) -> list[str]:
    """What the run trains: by parameter where it trains an adapter."""
    counts = job.counts()
    lines = [
        f"trainable: {counts['trainable']:,} parameters, {human_bytes(counts['trainable_bytes'])}",
        f"frozen: {counts['frozen']:,} parameters, {human_bytes(counts['frozen_bytes'])}",
    ]
    if not job.targets:
        return lines
    report = target_report(job.base, job.lora, layouts=job.layouts)
    return [str(dataclasses.replace(report, **counts)), "", *lines]
