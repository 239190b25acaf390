"""Pictures of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._drawing import BLUE, GREY, VERMILION
from ._plots import FEW, Numbers, new_figure
from ._run import Run

_PARTS = 40
"""A line is smoothed over a fortieth of its points to either side."""


def smoothing_width(count: int) -> int:
    """How many records wide a loss is smoothed: 0 for a few, which show by themselves."""
    return count // _PARTS if count > 2 * FEW else 0


def smoothed(values: Numbers, width: int) -> np.ndarray:
    """The mean of the values around each, weighted by a Gaussian bell.

        mean_i = Σ_j w_(i-j)·value_j / Σ_j w_(i-j),  w_k = exp(-k²/2·width²)

    Unlike a mean of the past it does not lag behind.

    Example:
        >>> smoothed([1.0, 1.0, 4.0, 4.0], 1).round(2).tolist()
        [1.25, 1.95, 3.05, 3.75]
    """
    if width == 0:
        return np.asarray(values)
    reach = np.arange(-4 * width, 4 * width + 1)
    bell = np.exp(-0.5 * (reach / width) ** 2)
    inside = slice(4 * width, 4 * width + len(values))
    total, weight = (np.convolve(x, bell)[inside] for x in (values, np.ones(len(values))))
    return total / weight


def plot_run_loss(run: Run) -> Any:
    """Training loss, raw and smoothed, and held-out loss over the steps."""
    figure = new_figure(7, 3.8)
    axes = figure.subplots()
    steps, losses = run.line("loss")
    width = smoothing_width(len(losses))
    if width:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training")
        label = "training, smoothed"
        axes.plot(steps, smoothed(losses, width), color=BLUE, linewidth=2, label=label)
    elif steps:
        marker = "o" if len(steps) <= FEW else None
        axes.plot(steps, losses, color=BLUE, marker=marker, markersize=4, label="training")
    at, held_out = run.line("eval_loss")
    marker = "s" if len(at) <= FEW else None
    axes.plot(at, held_out, color=VERMILION, marker=marker, markersize=5, label="held out")
    if run.keeps_best and run.best is not None:
        best = run.best
        axes.plot(best["step"], best["eval_loss"], "o", color=VERMILION, fillstyle="none",
                  markersize=12, label="kept")  # fmt: skip
    for number, step in enumerate(run.resumed_at):
        label = None if number else "went on from here"
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.legend(frameon=False)
    return figure


def plot_progress(run: Run) -> Any:
    """Learning rate, gradient norm, tokens per second and memory over the steps."""
    figure = new_figure(7, 4.6)
    axes = figure.subplots(2, 2, sharex=True)
    lines = {
        "learning rate": ("learning_rate", 1),
        "gradient norm": ("grad_norm", 1),
        "tokens/s": ("tokens_per_second", 1),
        "peak memory (GB)": ("peak_memory_bytes", 1e-9),
    }
    for own, (label, (key, unit)) in zip(axes.flat, lines.items(), strict=True):
        steps, values = run.line(key)
        few = len(steps) <= FEW
        own.plot(steps, unit * np.asarray(values), color=BLUE, marker="o" if few else None,
                 markersize=3, linewidth=1.2 if few else 0.8)  # fmt: skip
        own.set_ylabel(label)
        if key == "grad_norm" and values and 0 < 30 * min(values) < max(values):
            own.set_yscale("log")
        elif values:
            own.set_ylim(0, 1.08 * unit * max(values) or None)
    for own in axes[1]:
        own.set_xlabel("step")
    axes[0, 0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    clip = run.config["train"].get("clip_norm")
    if clip is not None:
        axes[0, 1].axhline(clip, color="black", linestyle="--", linewidth=1)
    return figure


def plot_lengths(lengths: Sequence[Sequence[int]]) -> Any:
    """How many sequences have up to so many tokens.

    Args:
        lengths: (upper bound, count), by length.
    """
    figure = new_figure(7, 2.6)
    axes = figure.subplots()
    bounds = [1 << n for n in range(_power(lengths[0][0]), _power(lengths[-1][0]) + 1)]
    known = {bound: count for bound, count in lengths}
    counts = [known.get(bound, 0) for bound in bounds]
    bars = axes.bar(range(len(bounds)), counts, 0.8, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8)
    names = [f"{max(bound // 2 + 1, 1):,}–{bound:,}" for bound in bounds]
    axes.set_xticks(range(len(bounds)), names, rotation=30 if len(bounds) > 7 else 0)
    axes.set(xlabel="tokens in a sequence", ylabel="sequences")
    return figure


def _power(bound: int) -> int:
    return bound.bit_length() - 1
