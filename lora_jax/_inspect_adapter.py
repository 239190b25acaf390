"""What an adapter learned: the spectrum of every delta, and the rank it would have needed."""

from pathlib import Path

from ._drawing import save_figure
from ._errors import InputError
from .adapters import delta_spectra
from .models import weight_norms
from .report import plot_spectra, spectra_table, spectra_words


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
    shares = {x.module: x.norm / norms[x.module] for x in spectra if x.module in norms}
    if picture is not None:
        figure = plot_spectra(spectra, shares or None)
        save_figure(figure, figure.axes, picture)
    return [*spectra_table(spectra, shares), "", *spectra_words(spectra)]


def is_adapter(directory: str) -> bool:
    """Whether a directory holds an adapter rather than a model."""
    if not Path(directory).is_dir() and directory != "bundled":
        raise InputError(f"{directory}: no such directory; give a model's or an adapter's")
    return Path(directory, "adapter_config.json").exists()
