"""What an adapter learned: the spectrum of every delta, and the rank it would have needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ._drawing import COLOURS, save_figure
from ._errors import InputError
from .adapters import DeltaSpectrum, delta_spectra
from .models import weight_norms

_BARS = " ▁▂▃▄▅▆▇█"


def inspect_adapter(directory: str, model: str | None, picture: str | None) -> list[str]:
    """Lines of a table: for every module rank, effective and suggested rank, norms, spectrum.

    Args:
        directory: The adapter's.
        model: Directory of its base, to compare norms with; or None.
        picture: Where to draw it, as a PNG file; or None.

    Raises:
        InputError: for whatever does not fit the files.
    """
    spectra = delta_spectra(directory)
    norms = {} if model is None else weight_norms(model, [x.module for x in spectra])
    if picture is not None:
        draw(spectra, picture)
    return [*_table(spectra, norms), "", *_advice(spectra)]


def _table(spectra: Sequence[DeltaSpectrum], norms: Mapping[str, float]) -> list[str]:
    width = max(len(x.module) for x in spectra)
    of_base = f"{'of base':>9}" if norms else ""
    lines = [
        f"{'module':{width}} {'r':>4} {'effective':>9} {'needed':>7} {'norm':>9}{of_base}  spectrum"
    ]
    for x in spectra:
        share = f"{x.norm / norms[x.module]:>9.2%}" if norms else ""
        lines.append(
            f"{x.module:{width}} {x.rank:>4} {x.effective_rank:>9.1f} {x.suggested_rank:>7}"
            f" {x.norm:>9.3g}{share}  {_bars(x.values)}"
        )
    return lines


def _bars(values: np.ndarray, most: int = 32) -> str:
    """A bar for each singular value, or for the largest of every few."""
    if not values.any():
        return "(nothing)"
    groups = np.array_split(values, min(len(values), most))
    return "".join(_BARS[round(8 * group.max() / values.max())] for group in groups)


def _advice(spectra: Sequence[DeltaSpectrum]) -> list[str]:
    """What the spectra say of the rank, in a line."""
    moved = [x for x in spectra if x.norm]
    if not moved:
        return ["no module has moved: the adapter does nothing"]
    needed = sorted(x.suggested_rank for x in moved)
    at = needed[int(0.9 * (len(needed) - 1))]
    most = max(x.rank for x in spectra)
    lines = [
        f"rank {at} keeps 99 % of nine modules in ten (given {most};"
        f" {needed[0]} to {needed[-1]} needed)"
    ]
    still = len(spectra) - len(moved)
    if still:
        lines.append(f"{still} of {len(spectra)} modules have not moved")
    return lines


def draw(spectra: Sequence[DeltaSpectrum], path: str) -> None:
    """Draw effective rank and norm of every kind of module over the layers.

    Raises:
        InputError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), layout="constrained")
    ranks, norms = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[DeltaSpectrum]] = {}
    for x in spectra:
        kinds.setdefault(x.module.rpartition(".")[2], []).append(x)
    for (kind, line), colour in zip(kinds.items(), COLOURS * len(kinds), strict=False):
        style = {"color": colour, "marker": "o", "markersize": 3, "label": kind}
        ranks.plot([x.effective_rank for x in line], **style)
        norms.plot([x.norm for x in line], **style)
    ranks.axhline(max(x.rank for x in spectra), color="black", linestyle="--", linewidth=1)
    ranks.set(ylabel="effective rank", ylim=(0, None), title="deltas of the adapter (dashed: r)")
    norms.set(ylabel="norm of the delta", xlabel="module of its kind, by layer", ylim=(0, None))
    ranks.legend(frameon=False, fontsize=8, ncols=4)
    norms.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, (ranks, norms), path)


def is_adapter(directory: str) -> bool:
    """Whether a directory holds an adapter rather than a model."""
    if not Path(directory).is_dir() and directory != "bundled":
        raise InputError(f"{directory}: no such directory; give a model's or an adapter's")
    return Path(directory, "adapter_config.json").exists()
