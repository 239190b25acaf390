"""The report of a run, written into its directory."""

from pathlib import Path

from .._drawing import save_figure
from .._files import atomic_file
from ._blocks import Page
from ._content import run_page
from ._html import html
from ._markdown import markdown
from ._run import read_run


def write_report(directory: str | Path) -> Path:
    """Write `report.md` with its pictures, and `report.html`, which holds its own.

    Only the run's files are read: `config.yaml` and `metrics.jsonl`, and of `run.json`,
    `samples.json`, `summary.json` and `adapter/` what is there.

    Args:
        directory: A run's directory.

    Returns:
        The path of `report.md`.

    Raises:
        InputError: if the run's files are missing or broken, or the report cannot be written.
    """
    directory = Path(directory)
    return write_page(run_page(read_run(directory)), directory, "report")


def write_page(page: Page, directory: Path, name: str) -> Path:
    """Write a page as Markdown, its pictures and as HTML; gives the path of the first."""
    for picture in page.pictures:
        save_figure(picture.figure, picture.figure.axes, directory / picture.name)
    path = directory / f"{name}.md"
    for own, text in ((path, markdown(page)), (path.with_suffix(".html"), html(page))):
        with atomic_file(own) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path
