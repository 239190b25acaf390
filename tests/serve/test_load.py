"""Two hundred requests at sixteen at a time, with faults: nothing breaks, and nothing is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
SCRIPT = Path(__file__).parents[2] / "experiments" / "serving" / "load.py"


@pytest.mark.slow
def test_a_server_holds_under_faults(base_dir, tmp_path):
    words = ["--model", str(base_dir), "--adapters", "8", "--new", "16", "--words", "10"]
    words += ["--requests", "200", "--at-once", "16", "--faults", "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out").read_text())
    assert found["models"] == 9 and found["visits"] > 0 and found["right_answers"] > 80
    kinds = {status.rpartition(" ")[0] for status in found["statuses"]}
    assert kinds == {"answer", "hang up", "load", "malformed", "oversized", "unload"}
