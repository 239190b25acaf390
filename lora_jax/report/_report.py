"""The report of a run, written into its directory."""

from pathlib import Path

from .._drawing import save_figure
from .._files import atomic_file
from ._blocks import Page
from ._content import run_page
from ._html import page_html
from ._markdown import markdown
from ._run import Run


def write_report(run: Run) -> Path:
    """Write `report.md` with its pictures, and `report.html`, which holds its own.

    Args:
        run: From `read_run`.

    Returns:
        The path of `report.md`, in the run's directory.

    Raises:
        InputError: if the report cannot be written.
    """
    return write_page(run_page(run), run.directory, "report")


def write_page(page: Page, directory: Path, name: str) -> Path:
    """Write a page as Markdown, its pictures and as HTML; gives the path of the first."""
    for picture in page.pictures:
        save_figure(picture.figure, picture.figure.axes, directory / picture.name)
    path = directory / f"{name}.md"
    for own, text in ((path, markdown(page)), (path.with_suffix(".html"), page_html(page))):
        with atomic_file(own) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path
