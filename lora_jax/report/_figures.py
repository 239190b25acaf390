"""Pictures of a run."""

from pathlib import Path

from .._drawing import BLUE, VERMILION, save_figure
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
    from matplotlib.figure import Figure

    records, path = read_records(directory), Path(directory) / "loss.png"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*series(records, "loss"), color=BLUE, label="training")
    axes.plot(*series(records, "eval_loss"), color=VERMILION, marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=Path(directory).name)
    axes.legend(frameon=False)
    save_figure(figure, [axes], path)
    return path
