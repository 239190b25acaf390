"""Write each notebook from its `.py`, run it in a kernel of its own, and keep its pictures.

    python experiments/notebooks/run.py [NAME ...]

prints a row of the README's table for each: wall time, and processor time of the kernel.
"""

import base64
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def write(source: Path) -> Any:
    """The notebook of a `.py`, written without outputs; nothing in it is drawn at random."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return notebook


def run(notebook: Any) -> tuple[float, float]:
    """Execute a notebook in place; seconds on the wall, and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def keep_pictures(notebook: Any, name: str) -> None:
    """The pictures among the outputs, as `pictures/NAME-1.png` and on."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [own["data"]["image/png"] for own in outputs if "image/png" in own.get("data", {})]
    for old in (FOLDER / "pictures").glob(f"{name}-[0-9].png"):
        old.unlink()
    for number, picture in enumerate(pictures, 1):
        path = FOLDER / "pictures" / f"{name}-{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(base64.b64decode(picture))


def main(names: list[str]) -> None:
    sources = sorted(p for p in FOLDER.glob("*.py") if p.name != Path(__file__).name)
    for source in sources:
        if names and source.stem not in names:
            continue
        notebook = write(source)
        wall, processor = run(notebook)
        if not source.stem.endswith("_zh"):  # whose pictures are the same
            keep_pictures(notebook, source.stem)
        print(f"| `{source.stem}` | {wall:.0f} s | {processor:.0f} s |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
