"""Other people's models run in processes of their own, with packages of their own in front."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Scripts that import what only those processes have.
collect_ignore = ["flax_transformers.py", "tunix_models.py"]


@pytest.fixture
def run_script() -> Callable[[str, str, str], None]:
    """Run a script of this folder on one model, with a folder of packages in front."""

    def run(package: str, script: str, model: str) -> None:
        packages = Path(sys.prefix) / "foreign" / package
        if not packages.is_dir():
            pytest.skip(f"needs {package}: ./lora test --all installs it")
        path = os.pathsep.join([str(packages), str(ROOT)])
        # transformers 4 would import what else is there.
        own = {"PYTHONPATH": path, "USE_TORCH": "0", "USE_TF": "0"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), model],
            env=os.environ | own,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]

    return run
