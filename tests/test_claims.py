"""The claims: each script runs to its end on next to nothing; the tables are of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "claims"
SHARED = {"bases", "common", "costs", "outcome", "table", "tasks"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)
COMMANDS = [[name] for name in NAMES] + [["full", "--costs"]] * ("full" in NAMES)
pytestmark = pytest.mark.skipif(not NAMES, reason="the experiments are not part of this copy")


def run(script, *options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, FOLDER / f"{script}.py", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_claim_is_tried_to_its_end(command, tmp_path):
    if "LORA_JAX_TEST_DATA" not in os.environ:
        pytest.skip("LORA_JAX_TEST_DATA names no data")
    name, *more = command
    done = run(name, *more, "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "results").glob("*.json")
    assert json.loads(results.read_text("utf-8"))["conditions"]["jax"]
    assert "| --- |" in done.stdout, "there is no table"
    drawn = [path.name for path in tmp_path.glob("pictures/*.png")]
    assert drawn == ([] if more else [f"{name}.png"])


@pytest.mark.slow  # it imports every script
def test_the_tables_are_those_of_the_results():
    done = run("table", "--check")
    assert done.returncode == 0, f"run experiments/claims/table.py; {done.stderr}"


def test_results_are_told_of_and_drawn():
    told = "".join(path.read_text("utf-8") for path in FOLDER.glob("README.md"))
    names = {path.stem for path in (FOLDER / "results").glob("*.json")}
    assert names
    assert {name for name in names if f"<!-- {name} -->" not in told} == set()
    drawn = {path.stem for path in (FOLDER / "pictures").glob("*.png")}
    assert names & set(NAMES) == drawn
