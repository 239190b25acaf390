"""The package as somebody installs it: built, put where no checkout is, and tried."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def build(kind: str, source: Path, into: Path) -> Path:
    """A distribution, made by the backend that pip would call."""
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(into)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    return into / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel of the checkout, and that of its source distribution."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("checkout", "direct", "unpacked", "again"):
        (folder / name).mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):  # nothing that lies about beside them
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    packed = build("sdist", folder / "checkout", folder / "direct")
    shutil.unpack_archive(packed, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    direct = build("wheel", folder / "checkout", folder / "direct")
    return direct, build("wheel", source, folder / "again")


@pytest.fixture(scope="module")
def lora(wheels, tmp_path_factory):
    """Calls the command that the installed wheel brings, in an empty folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    zipfile.ZipFile(wheels[0]).extractall(where)
    # What it needs is here already.
    Path(where, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    names = Path(where).glob("lora_jax-*.dist-info/entry_points.txt")
    (line,) = [line for name in names for line in name.read_text().splitlines() if " = " in line]
    module, function = line.partition(" = ")[2].split(":")
    call = f"import lora_jax; from {module} import {function}; {function}()"
    (folder / "empty").mkdir()

    def run(*words: str) -> str:
        made = subprocess.run(
            [python, "-P", "-c", call, *words],
            cwd=folder / "empty",
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return made.stdout

    return run


def test_everything_is_in_it(wheels):
    direct, again = (zipfile.ZipFile(wheel) for wheel in wheels)
    content = {name: direct.read(name) for name in direct.namelist()}
    assert {name: again.read(name) for name in again.namelist()} == content
    tracked = subprocess.run(
        ["git", "ls-files", "lora_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.splitlines()) <= set(content)
    assert {"lora_jax/py.typed", "lora_jax/configs/quickstart.yaml"} <= set(content)
    assert not [name for name in content if name.startswith(("tests/", "experiments/"))]


def test_it_works_where_no_checkout_is(lora):
    assert "\n  lora quickstart\n" in lora()
    assert lora("--version").startswith("lora_jax ")
    assert "  install " not in lora("--help") and "\n  lora train " in lora("train", "--help")
    assert "⟦" in lora("data", "show", "stdlib", "--count", "1")
    few = "--train.steps 2 --data.train_rows 24 --data.eval_rows 6 --data.max_length 128"
    lora("quickstart", *few.split(), "--train.batch_size", "2", "--train.tensorboard", "false")
    assert "\n  lora chat runs/quickstart/base --adapter runs/quickstart/adapter\n" in lora()
