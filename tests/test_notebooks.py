"""The notebooks: each says what its `.py` says, holds no outputs, and runs from end to end."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not NAMES, reason="the notebooks are not part of this copy")


def cells(name):
    """(kind, text) of the cells of a notebook."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def cells_of_py(name):
    """The same of a `.py` in percent format."""
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    _, *parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    return [
        ("markdown", uncommented(body)) if kind else ("code", body.strip("\n"))
        for kind, body in zip(parts[::2], parts[1::2], strict=True)
    ]


def uncommented(text):
    return re.sub(r"^# ?", "", text.strip("\n"), flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_both_of_a_pair_say_the_same(name):
    magic = re.compile(r"^%", re.MULTILINE)  # which a `.py` has as a comment
    found = [(kind, magic.sub("# %", x) if kind == "code" else x) for kind, x in cells(name)]
    assert found == cells_of_py(name), "python experiments/notebooks/run.py writes it anew"


def test_every_py_has_its_notebook():
    sources = {path.stem for path in FOLDER.glob("*.py")} - {"run"}
    assert sources == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_kept(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_zh")])
def test_a_translation_runs_the_same_code(name):
    own, original = cells(name), cells(name.removesuffix("_zh"))
    assert [kind for kind, _ in own] == [kind for kind, _ in original]
    assert [x for x in own if x[0] == "code"] == [x for x in original if x[0] == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_the_readme_are_there(name):
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert f"({name}.ipynb)" in readme
    for picture in re.findall(r"\((pictures/[^)]+)\)", readme):
        assert (FOLDER / picture).is_file(), picture


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path):
    for needed in ("nbmake", "ipykernel", "sklearn", "treescope"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: ./lora test --all installs it")
    # As a reader runs it, not as the tests do: compiled for speed.
    own = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS" and "PYTEST" not in k}
    own |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    words = ["--nbmake", "--nbmake-timeout=600", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words, str(FOLDER / f"{name}.ipynb")],
        cwd=ROOT, env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
