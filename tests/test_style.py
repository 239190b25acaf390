"""One style: ruff on everything, pyright on the package."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"]])
def test_ruff(command):
    check(*command, "--no-cache", ".")


@pytest.mark.slow
def test_types():
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs pyright: ./lora test --all installs it")
    check("pyright")


def check(*command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
