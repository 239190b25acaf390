"""Pictures of numbers at hand, as figures that a notebook shows."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
from jaxtyping import Float

from .._drawing import APART, BLUE, GREY, VERMILION, tidy
from .._errors import InputError
from .._typing import Array

Matrix = Float[Array | np.ndarray, "rows columns"]
Numbers = Sequence[float] | Float[Array | np.ndarray, " count"]
FEW = 20
"""Points of a line that are marked one by one."""


def plot_losses(
    losses: Mapping[str, tuple[Numbers, Numbers]],
    *,
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "loss (nats per trained token)",
) -> Any:
    """Draw a line for each name: losses over steps, or any numbers over others.

    Args:
        losses: For each name, where its points are and what they are.
        title, xlabel, ylabel: What stands beside the axes; a unit belongs to each.

    Returns:
        A matplotlib `Figure`, which a notebook shows and `savefig` writes.

    Raises:
        InputError: if there is nothing to draw, or a line's two sequences differ in length.

    Example:
        >>> figure = plot_losses({"training": ([1, 2, 3], [3.0, 2.5, 2.2])})
        >>> figure.axes[0].get_ylabel()
        'loss (nats per trained token)'
    """
    for name, (steps, values) in something("plot_losses", losses).items():
        if len(steps) != len(values):
            raise InputError(
                f"plot_losses: {name} has {len(steps)} steps and {len(values)} losses; give as many"
                " of one as of the other"
            )
    figure = new_figure()
    axes = figure.subplots()
    for (name, (steps, values)), colour in zip(losses.items(), colours(losses), strict=True):
        marker = "o" if len(steps) <= FEW else None
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def plot_rank_loss(
    losses: Mapping[str, Mapping[int, float]],
    *,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    ylabel: str = "held-out loss (nats per trained token)",
) -> Any:
    """Draw a loss over the rank that reaches it, on a logarithmic axis.

    Args:
        losses: For each line its name, and the loss at each rank.
        levels: Losses that have no rank, such as those before training and of all weights trained.
        title, ylabel: What stands above and beside.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> figure = plot_rank_loss({"trained": {1: 2.5, 4: 2.1}}, levels={"before": 3.0})
        >>> figure.axes[0].get_xscale()
        'log'

    Source: the question of Hu et al. 2021, "LoRA", section 7.2.
    """
    something("plot_rank_loss", losses)
    figure = new_figure()
    axes = figure.subplots()
    for (name, line), colour in zip(losses.items(), colours(losses), strict=True):
        axes.plot(*zip(*sorted(line.items()), strict=True), color=colour, marker="o", label=name)
    styles = ("--", ":", "-.") * len(levels or {})
    for (name, level), style in zip((levels or {}).items(), styles, strict=False):
        axes.axhline(level, color=GREY, linestyle=style, label=name)
    ranks = sorted({rank for line in losses.values() for rank in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, list(map(str, ranks)))
    axes.minorticks_off()
    axes.set(xlabel="rank r", ylabel=ylabel, title=title)
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return figure


def plot_singular_values(values: Mapping[str, Numbers], *, title: str = "") -> Any:
    """Draw singular values, the largest first, on a logarithmic axis.

    What lies below a hundred-thousandth of the largest is rounding, and left out.

    Args:
        values: For each line its name, and its singular values `(count,)` in falling order.
        title: What stands above.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> values = np.linalg.svd(np.diag([3.0, 2.0, 1.0]), compute_uv=False)
        >>> plot_singular_values({"delta": values}).axes[0].get_yscale()
        'log'
    """
    something("plot_singular_values", values)
    figure = new_figure()
    axes = figure.subplots()
    top = max(float(np.max(line)) for line in values.values())
    for (name, line), colour in zip(values.items(), colours(values), strict=True):
        shown = np.where(np.asarray(line) > 1e-5 * top, line, np.nan)
        axes.plot(np.arange(1, len(shown) + 1), shown, color=colour, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="number of the singular value", ylabel="singular value", title=title)
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def plot_matrices(matrices: Mapping[str, Matrix], *, title: str = "") -> Any:
    """Draw matrices in a row, all cells of one size: negative ones blue, positive ones vermilion.

    Each has colours of its own up to its largest entry, which is written below it.

    Args:
        matrices: For each its name, and its entries `(rows, columns)`.
        title: What stands above all.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw.

    Example:
        >>> figure = plot_matrices({"A": np.ones((8, 2)), "B": -np.ones((2, 8))})
        >>> [axes.get_title() for axes in figure.axes]
        ['A', 'B']
    """
    from matplotlib.colors import LinearSegmentedColormap

    something("plot_matrices", matrices)
    signed = LinearSegmentedColormap.from_list("signed", [BLUE, "white", VERMILION])
    rows = max(matrix.shape[0] for matrix in matrices.values())
    columns = sum(matrix.shape[1] for matrix in matrices.values())
    cell = min(9 / columns, 5 / rows, 0.25)  # inches
    # A thin matrix needs room for its name all the same.
    widths = [max(cell * matrix.shape[1], 0.07 * len(name) + 0.2, 0.5)
              for name, matrix in matrices.items()]  # fmt: skip
    width, height = sum(widths) + 0.2 * len(widths) + 0.2, cell * rows + 1.1
    figure = new_figure(width, height, layout=None)
    left = 0.2
    for (name, matrix), slot in zip(matrices.items(), widths, strict=True):
        high, wide = (cell * count for count in matrix.shape)
        at = (left + (slot - wide) / 2, 0.4 + (cell * rows - high) / 2)
        axes = figure.add_axes((at[0] / width, at[1] / height, wide / width, high / height))
        limit = float(np.abs(matrix).max())
        axes.imshow(matrix, cmap=signed, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(title=name, xlabel=f"±{limit:.2g}", xticks=[], yticks=[])
        left += slot + 0.2
    figure.suptitle(title)
    return figure


def plot_table(table: Mapping[str, Mapping[str, float]], *, title: str, digits: int = 2) -> Any:
    """Draw numbers as a table whose cells are the darker the larger they are.

    Args:
        table: For each row its name, and a number for each column.
        title: What the numbers are, with their unit.
        digits: Digits behind the point.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: if there is nothing to draw, or rows differ in their columns.

    Example:
        >>> table = {"legal": {"law": 0.9, "verse": 0.2}, "poems": {"law": 0.3, "verse": 0.8}}
        >>> figure = plot_table(table, title="accuracy")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['law', 'verse']
    """
    from matplotlib.colors import LinearSegmentedColormap

    columns = list(next(iter(something("plot_table", table).values())))
    for name, row in table.items():
        if list(row) != columns:
            raise InputError(
                f"plot_table: row {name} has the columns {', '.join(row)}, and the first row"
                f" {', '.join(columns)}; give all rows the same"
            )
    values = np.array([list(row.values()) for row in table.values()])
    figure = new_figure(2.5 + 1.3 * len(columns), 1.4 + 0.6 * len(table))
    axes = figure.subplots()
    axes.imshow(values, cmap=LinearSegmentedColormap.from_list("", ["white", BLUE]), aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(table)), list(table))
    dark = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > dark else "black"
        axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=colour)
    axes.set_title(title)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def new_figure(width: float = 7, height: float = 4, layout: Any = "constrained") -> Any:
    """A figure of so many inches that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def as_label(name: str) -> str:
    """A name as matplotlib shows it: no formula between its dollars, nor hidden for its underscore.

    Example:
        >>> as_label("a$b$"), as_label("_mine")
        ('a\\\\$b\\\\$', ' _mine')
    """
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def something(where: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is given, if it can be drawn."""
    if not given or not all(len(own) for own in given.values()):
        raise InputError(f"{where}: there is nothing to draw; give names and their numbers")
    return given


def colours(names: Sized) -> list[str]:
    """A colour for each of a few lines."""
    return [APART[i % len(APART)] for i in range(len(names))]
