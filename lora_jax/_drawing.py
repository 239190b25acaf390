"""How every picture looks: its colours, its frame, and how it is written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._files import atomic_file

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#888888"
COLOURS = (BLUE, "#56B4E9", "#009E73", "#F0E442", "#E69F00", VERMILION, "#CC79A7", GREY)
APART = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)
"""The same for a few lines, so that neighbours differ most; yellow is too pale for a line."""


def tidy(axes: Any) -> None:
    """A pale grid, and no frame above and on the right."""
    axes.grid(color=GREY, alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Any, axes: Iterable[Any], path: str | Path) -> None:
    """Write a figure as a PNG file, whole or not at all, its axes without a frame.

    Raises:
        InputError: if the file cannot be written.
    """
    for own in axes:
        tidy(own)
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
