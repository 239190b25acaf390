"""Pictures of a run."""

from pathlib import Path

from .._drawing import save_figure
from ._plots import plot_losses
from ._records import read_records, series


def draw_loss(directory: str | Path) -> Path:
    """Draw training and held-out loss over the steps into the run's `loss.png`.

    Args:
        directory: A run's directory; its `metrics.jsonl` is read.

    Returns:
        The picture's path.

    Raises:
        InputError: if there are no metrics, or the picture cannot be written.
    """
    records, path = read_records(directory), Path(directory) / "loss.png"
    lines = {"training": series(records, "loss"), "held out": series(records, "eval_loss")}
    figure = plot_losses(lines, title=Path(directory).name)
    save_figure(figure, figure.axes, path)
    return path
