"""Colours where somebody sees them, and silence where nobody reads."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, False),
    ],
)
def test_an_error_begins_in_red_where_that_is_wanted(variables, coloured, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["trian", "x" * 200])
    err = capsys.readouterr().err
    assert ("\x1b[1;31merror:\x1b[0m" in err) == coloured
    assert err.count("\n") == 1 and "did you mean 'train'" in err


@pytest.mark.parametrize("words", [[], ["--help"], ["serve", "--help"]])
def test_nobody_reads_what_is_written(words):
    """`true` ends before Python has begun."""
    command = f"{shlex.join([sys.executable, '-m', 'lora_jax', *words])} | true"
    run = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
