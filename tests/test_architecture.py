"""The floors of CONTRIBUTING.md, a light `import lora_jax`, and what no file may hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_jax"
HEAVY = {
    "datasets",
    "grain",
    "lm_eval",
    "matplotlib",
    "orbax",
    "pyarrow",
    "rich",
    "starlette",
    "tensorboardX",
    "tokenizers",
    "uvicorn",
    "wandb",
}
ORACLES = {"bitsandbytes", "peft", "qwix", "torch", "transformers"}
# Character classes, so that this file does not hold what it looks for.
FORBIDDEN = re.compile(
    r"/wor[k]/|/roo[t]/|/hom[e]/|/op[t]/|/User[s]/|pypi[.]or[g]|pytorch[.]org/wh[l]|index-ur[l]="
)


def test_every_file_is_on_a_floor():
    on_disk = {unit_of(module) for module in modules()} - {""}
    assert on_disk <= set(floors()), "give it a floor in the table of CONTRIBUTING.md"


def test_imports_point_to_lower_floors():
    wrong = [
        f"{name} (floor {floors()[unit_of(name)]}) imports {target}"
        for name in modules()
        if unit_of(name)
        for target in imported(name)
        if not may_import(unit_of(name), unit_of(target))
    ]
    assert not wrong


def test_no_import_goes_in_circles():
    try:
        TopologicalSorter({name: set(imported(name)) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_package_inits_only_reexport():
    for name, path in modules().items():
        if path.name != "__init__.py":
            continue
        docstring, *rest = ast.parse(path.read_text("utf-8")).body
        assert isinstance(docstring, ast.Expr), f"{name} has no docstring"
        if name == "lora_jax":  # what it lists is imported when it is asked for
            rest = ast.parse(path.with_suffix(".pyi").read_text("utf-8")).body
        assert all(isinstance(node, ast.ImportFrom) for node in rest), f"{name} holds code"


def test_modules_are_private():
    public = {name for name, path in modules().items() if not path.name.startswith("_")}
    assert public <= {"lora_jax.cli"}


def test_neither_oracles_nor_pickles_are_imported():
    for name, path in modules().items():
        assert not roots(path) & (ORACLES | {"pickle", "dill", "cloudpickle"}), name


def test_import_is_light():
    """A command that needs no JAX starts without it."""
    assert not loaded_by("import lora_jax, lora_jax.cli, lora_jax.plan") & {"jax", *HEAVY}


def test_what_it_imports_is_light():
    """What flax and optax import by themselves is theirs; we add nothing heavy to it."""
    before = loaded_by("import jax, flax.linen, optax, lazy_loader")
    added = loaded_by("import jax, flax.linen, optax; from lora_jax import *") - before
    assert "lora_jax" in added
    assert not added & (HEAVY | ORACLES)


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh process has imported after running code."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("folder", ["lora_jax", "tests", "experiments"])
def test_files_are_short(folder):
    lengths = {
        path.relative_to(ROOT): len(path.read_text("utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {str(path): count for path, count in lengths.items() if count > 400}


def test_no_file_names_a_machine_or_a_package_index():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text("utf-8", errors="ignore").splitlines(), 1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


@cache
def floors() -> dict[str, int]:
    """Unit (`quant`, `_tree`) to floor, from the table of CONTRIBUTING.md."""
    table = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines():
        if match := re.match(r"\| (\d+) \| ((?:`[^`]+` ?)+)\|", line):
            for name in re.findall(r"`([^`]+)`", match[2]):
                table[name.removesuffix(".py").rstrip("/")] = int(match[1])
    return table


@cache
def modules() -> dict[str, Path]:
    """Dotted name of every module, packages by the name of their `__init__`."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def unit_of(module: str) -> str:
    """`lora_jax.quant._tensor` is part of the unit `quant`; the package itself is of none."""
    return (module.split(".") + [""])[1]


def may_import(unit: str, target: str) -> bool:
    if unit == target:
        return True
    if not target or floors()[target] > floors()[unit]:
        return False
    single_files = not (PACKAGE / unit).is_dir() and not (PACKAGE / target).is_dir()
    return floors()[target] < floors()[unit] or single_files


@cache
def imported(module: str) -> tuple[str, ...]:
    """The modules of this package that one imports, in functions too."""
    path = modules()[module]
    tree = ast.parse(path.read_text("utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for name in _absolute_names(tree, package):
        # `from ..quant import quantize` names a module or something in one.
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return tuple(sorted(found - {module}))


def _absolute_names(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*parents, node.module or ""] if node.level else [node.module or ""])
            yield from (f"{start.rstrip('.')}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    absolute = [n for n in ast.walk(tree) if not (isinstance(n, ast.ImportFrom) and n.level)]
    return {name.partition(".")[0] for node in absolute for name in _node_names(node)}


def _node_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def text_files() -> list[Path]:
    """Files under version control, or where there is no git the folders that would be."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        folders = ["lora_jax", "tests", "configs", "experiments", "requirements"]
        files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        files += [*ROOT.glob("*.md"), ROOT / "lora", ROOT / "pyproject.toml"]
    binary = {".safetensors", ".npz", ".png", ".gif", ".parquet"}
    return [path for path in files if path.is_file() and path.suffix not in binary]
