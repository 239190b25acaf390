"""What an adapter learned: the spectrum of every delta, and the rank it would have needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._drawing import APART
from ..adapters import DeltaSpectrum
from ._plots import new_figure

_BARS = " ▁▂▃▄▅▆▇█"
_MARKERS = "osD^v<>P"
_OF_TEN = 0.9
"""Nine modules in ten: a single one that needs more does not decide the rank of all."""


def spectra_table(spectra: Sequence[DeltaSpectrum], shares: Mapping[str, float]) -> list[str]:
    """A line for each module: rank, effective and needed rank, norm and spectrum.

    Args:
        spectra: From `adapters.delta_spectra`.
        shares: Norm of a module's delta over that of its kernel, where it is known.
    """
    width = max(len(x.module) for x in spectra)
    of_base = f"{'of base':>9}" if shares else ""
    lines = [
        f"{'module':{width}} {'r':>4} {'effective':>9} {'needed':>7} {'norm':>9}{of_base}  spectrum"
    ]
    for x in spectra:
        share = f"{shares[x.module]:>9.2%}" if x.module in shares else " " * len(of_base)
        lines.append(
            f"{x.module:{width}} {x.rank:>4} {x.effective_rank:>9.1f} {x.suggested_rank:>7}"
            f" {x.norm:>9.3g}{share}  {_bars(x.values)}"
        )
    return lines


def spectra_by_kind(spectra: Sequence[DeltaSpectrum], shares: Mapping[str, float]) -> list[Any]:
    """For each kind of module its name, how many, and medians: (r, effective, needed, share)."""
    rows = []
    for kind, own in _kinds(spectra).items():
        known = [shares[x.module] for x in own if x.module in shares]
        effective, needed = (
            float(np.median([getattr(x, name) for x in own]))
            for name in ("effective_rank", "suggested_rank")
        )
        ranks = sorted({x.rank for x in own})
        rows.append((kind, len(own), ranks, effective, needed, np.median(known) if known else None))
    return rows


def needed_rank(spectra: Sequence[DeltaSpectrum]) -> int | None:
    """The rank that keeps 99 % of nine in ten of the modules that have moved; None if none has."""
    needed = sorted(x.suggested_rank for x in spectra if x.norm)
    return needed[int(_OF_TEN * (len(needed) - 1))] if needed else None


def spectra_words(spectra: Sequence[DeltaSpectrum]) -> list[str]:
    """What the spectra say of the rank, in a line."""
    at = needed_rank(spectra)
    if at is None:
        return ["no module has moved: the adapter does nothing"]
    needed = [x.suggested_rank for x in spectra if x.norm]
    lines = [
        f"rank {at} keeps 99 % of nine modules in ten (given {max(x.rank for x in spectra)};"
        f" {min(needed)} to {max(needed)} needed)"
    ]
    still = len(spectra) - len(needed)
    if still:
        lines.append(f"{still} of {len(spectra)} modules have not moved")
    return lines


def plot_spectra(
    spectra: Sequence[DeltaSpectrum], shares: Mapping[str, float] | None = None
) -> Any:
    """Draw effective rank and norm of every kind of module over the layers.

    Args:
        spectra: From `adapters.delta_spectra`.
        shares: Norms over those of the kernels, which are drawn instead where all are known.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure(7, 5.6)
    norms, ranks = figure.subplots(2, 1, sharex=True)
    relative = shares is not None and all(x.module in shares for x in spectra)
    for i, (kind, line) in enumerate(_kinds(spectra).items()):
        style = {"color": APART[i % len(APART)], "marker": _MARKERS[i % len(_MARKERS)],
                 "markersize": 4, "linewidth": 1.2, "label": kind}  # fmt: skip
        norms.plot([shares[x.module] if relative and shares else x.norm for x in line], **style)
        ranks.plot([x.effective_rank for x in line], **style)
    ranks.axhline(max(x.rank for x in spectra), color="black", linestyle="--", linewidth=1)
    ranks.set(ylabel="effective rank (dashed: r)", ylim=(0, None), xlabel="layer of its kind")
    norms.set(ylim=(0, None), ylabel="norm of the delta")
    if relative:
        norms.yaxis.set_major_formatter(PercentFormatter(1.0))
        norms.set_ylabel("norm of the delta\n(of the kernel's)")
    for axis in (ranks.xaxis, ranks.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*norms.get_legend_handles_labels(), frameon=False, fontsize="small",
                  loc="outside upper center", ncols=4)  # fmt: skip
    return figure


def _kinds(spectra: Sequence[DeltaSpectrum]) -> dict[str, list[DeltaSpectrum]]:
    """The modules of each kind, by the last part of their names; experts by the last but one."""
    kinds: dict[str, list[DeltaSpectrum]] = {}
    for x in spectra:
        parts = [part for part in x.module.split(".") if not part.isdigit()]
        kinds.setdefault(parts[-1], []).append(x)
    return kinds


def _bars(values: np.ndarray, most: int = 32) -> str:
    """A bar for each singular value, or for the largest of every few."""
    if not values.any():
        return "(nothing)"
    groups = np.array_split(values, min(len(values), most))
    return "".join(_BARS[round(8 * group.max() / values.max())] for group in groups)
