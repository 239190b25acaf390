"""Pictures of a run."""

from pathlib import Path

from .._files import atomic_file
from ._records import read_records, series

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#888888"


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
    axes.grid(color=GREY, alpha=0.2)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
