"""Pictures of four-bit numbers: what they can be, and how far they are from the weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._drawing import GREY, tidy
from ._plots import Numbers, colours, new_figure, something


def plot_codebook(
    codebooks: Mapping[str, Numbers],
    weights: Numbers | None = None,
    *,
    title: str = "",
) -> Any:
    """Draw the values that codes stand for, each codebook a row, over a histogram of weights.

    Args:
        codebooks: For each its name, and its values in [-1, 1].
        weights: Weights `(count,)` over the largest of their block, in [-1, 1].
        title: What stands above.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> figure = plot_codebook({"even": np.linspace(-1, 1, 16)})
        >>> figure.axes[0].get_xlabel()
        'weight over the largest of its block'
    """
    something("plot_codebook", codebooks)
    figure = new_figure(7, 2 + 0.5 * len(codebooks) + (weights is not None))
    axes = figure.subplots()
    if weights is not None:
        counts, edges = np.histogram(weights, bins=80, range=(-1, 1))
        heights = counts / counts.max() * len(codebooks)
        axes.stairs(heights, edges, fill=True, color=GREY, alpha=0.3, label="weights")
        axes.legend(frameon=False, loc="upper right")
    for i, ((_, values), colour) in enumerate(
        zip(codebooks.items(), colours(codebooks), strict=True)
    ):
        axes.vlines(values, i + 0.15, i + 0.85, color=colour, linewidth=2)
    axes.set_yticks(np.arange(len(codebooks)) + 0.5, list(codebooks))
    axes.set(xlabel="weight over the largest of its block", title=title, ylim=(0, None))
    tidy(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure


def plot_quantization_error(errors: Mapping[str, Mapping[str, float]], *, title: str = "") -> Any:
    """Draw errors as bars, a group for each name and in it a bar for each kind of weights.

    Args:
        errors: For each format its name, and for each kind of weights the root of the mean
            squared error as a share of that of the weights, as `quant.quantization_error` has it.
        title: What stands above.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> figure = plot_quantization_error({"nf4": {"normal": 0.09}, "int4": {"normal": 0.12}})
        >>> [float(bar.get_height()) for bar in figure.axes[0].patches]  # in per cent
        [9.0, 12.0]
    """
    something("plot_quantization_error", errors)
    figure = new_figure(8.5, 4)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for own in errors.values() for kind in own))
    width = 0.8 / len(kinds)
    for i, (kind, colour) in enumerate(zip(kinds, colours(kinds), strict=True)):
        at = np.arange(len(errors)) + (i - (len(kinds) - 1) / 2) * width
        shares = [100 * own.get(kind, np.nan) for own in errors.values()]
        bars = axes.bar(at, shares, width, color=colour, label=kind)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(errors)), list(errors))
    axes.set(ylabel="error (% of the weights' root mean square)", title=title)
    axes.legend(frameon=False)
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    return figure


def plot_block_sizes(
    errors: Mapping[str, Mapping[int, tuple[float, float]]], *, title: str = ""
) -> Any:
    """Draw the error over what a weight takes, a line for each format through its block sizes.

    Args:
        errors: For each line its name, and for each block size the bits of a weight, absmax
            values counted, and the error as in `plot_quantization_error`.
        title: What stands above.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> figure = plot_block_sizes({"nf4": {64: (4.5, 0.09), 256: (4.125, 0.1)}})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['64', '256']
    """
    something("plot_block_sizes", errors)
    figure = new_figure()
    axes = figure.subplots()
    for i, ((name, sizes), colour) in enumerate(zip(errors.items(), colours(errors), strict=True)):
        bits, shares = zip(*((bits, 100 * share) for bits, share in sizes.values()), strict=True)
        axes.plot(bits, shares, color=colour, marker="o", label=name)
        offset, side = ((5, 4), "left") if i % 2 == 0 else ((-6, -9), "right")
        for size, *at in zip(sizes, bits, shares, strict=True):
            axes.annotate(str(size), at, xytext=offset, textcoords="offset points", ha=side,
                          fontsize=8, color=colour)  # fmt: skip
    axes.set(xlabel="bits per weight", title=title,
             ylabel="error (% of the weights' root mean square)")  # fmt: skip
    axes.legend(frameon=False)
    tidy(axes)
    return figure
