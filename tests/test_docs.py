"""Every Python block of the README runs as it stands; every `./lora` command is one there is."""

import re
import shlex
from pathlib import Path

import pytest

from lora_jax.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page.is_file()]


def python_blocks():
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(page, line, match[1], id=f"{page.name}:{line}")


def lora_commands():
    """The words of each command, shown on a line of its own or between backticks."""
    for page in PAGES:
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
            shown = re.findall(r"`(\./lora [^`]+)`", line)
            if match := re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(\./lora .*)", line):
                shown.append(match[1])
            for command in shown:
                words = tuple(shlex.split(command, comments=True)[1:])
                if words[0] not in ("test", "install") and not words[0].isupper():
                    yield pytest.param(words, id=f"{page.name}:{number}")


@pytest.mark.parametrize(("page", "line", "code"), list(python_blocks()))
def test_python_block_runs(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The empty lines make a traceback point into the page.
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("words", list(lora_commands()))
def test_command_exists(words, capsys):
    name = []
    for word in words[:2]:
        if not re.fullmatch(r"[a-z]+", word):
            break
        name.append(word)
    with pytest.raises(SystemExit) as end:
        main([*name, "--help"])
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z-]+$", word)}
    assert all(flag in shown.out for flag in flags), shown.out
