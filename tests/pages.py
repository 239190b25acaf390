"""The pages of the documentation: their blocks, and how a reader does what they say."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_jax.cli import main
from lora_jax.train import run_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [page for page in [*PAGES, *sorted((ROOT / "docs").glob("*.md"))] if page.is_file()]
OPERATORS = {"|", "<", ">", ">>", "&", "&&", ";"}
EXTRA = {
    "train": "--train.steps 2 --train.batch_size 2 --data.max_length 64 --data.train_rows 40"
    " --train.samples 0",
    "sweep": "--train.steps 2 --train.batch_size 2 --data.max_length 64 --data.train_rows 40",
    "evaluate": "--data.eval_rows 4 --batch-size 2",
    "generate": "--max-new-tokens 4",
}
"""What is added to a page's command, so that it takes seconds: by the command's name."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences, and the number of its first line."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found]


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: continued lines joined, a here-document with its lines."""
    lines = iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines).strip()
        if end := re.search(r"<<'?(\w+)'?", line):
            body = [line]
            while body[-1] != end[1]:
                body.append(next(lines))
            line = "\n".join(body)
        while line.count("'") % 2:  # a text of several lines
            line += "\n" + next(lines)
        if line.strip() and not line.startswith("#"):
            yield line


class Reader:
    """Does what a page says, block by block, in one folder and one Python.

    The folder has what a clone has: `configs/`, `docs/`, `./lora`.  `quickstart` gives a directory
    that the quickstart left, so that the pages need not wait for one each.
    """

    def __init__(self, folder: Path, quickstart: Callable[[], Path]) -> None:
        self.folder, self.names = folder, {"__name__": "__main__"}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.port, self.quickstart = free_port(), quickstart
        for name in ("configs", "docs"):
            (folder / name).symlink_to(ROOT / name)
        stub = f'#!/bin/sh\nexec "{sys.executable}" -m lora_jax "$@"\n'
        (folder / "lora").write_text(stub)
        (folder / "lora").chmod(0o755)

    def read(self, page: Path) -> None:
        """Run a page's blocks in order; the last command before an error must give it."""
        found = blocks(page)
        words = "".join(block.text for block in found)
        if "runs/quickstart" in words and "./lora quickstart" not in words:
            self.run("./lora quickstart")  # which the reader has done before
        for block, after in zip(found, [*found, None][1:], strict=True):
            told = after.text.strip() if after and after.text.startswith("error: ") else None
            self.do(block, told)

    def do(self, block: Block, error: str | None = None) -> None:
        place = f"{block.page.name}:{block.line}"
        if block.language == "python":
            # The empty lines make a traceback point into the page.
            code = compile("\n" * block.line + self.here(block.text), str(block.page), "exec")
            exec(code, self.names)
        elif block.language == "sh":
            *before, last = commands(self.here(block.text))
            for command in [*before, last]:
                said, expected = self.run(command), error if command is last else None
                same = (said or "").split() == (expected or "").split()
                assert same, f"{place}: {command}: {said or 'no error'}"

    def here(self, text: str) -> str:
        """Words that name a port name one that nobody else uses."""
        return text.replace("8000", str(self.port))

    def run(self, command: str) -> str | None:
        """What a command that failed said, or None."""
        words = shlex.split(command, comments=True)
        if words[0] != "./lora" or OPERATORS & set(words):
            return self.shell(command)
        if words[1] == "serve":
            self.serve(command)
            return None
        if words[1] == "quickstart":
            shutil.copytree(self.quickstart(), self.folder / "runs/quickstart")
            return None
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                main([*words[1:], *EXTRA.get(words[1], "").split()])
        except SystemExit as end:
            return said.getvalue() or "failed" if end.code not in (0, None) else None
        return None

    def shell(self, command: str) -> str | None:
        if shutil.which(command.split()[0]) is None:  # curl is not everywhere
            return None
        if command.startswith("./lora serve"):
            self.serve(command.removesuffix("&"))
            return None
        run = subprocess.run(
            ["sh", "-ec", command], cwd=self.folder, env=environment(), text=True,
            capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        return run.stderr + run.stdout or "failed" if run.returncode else None

    def serve(self, command: str) -> None:
        """Start a server, and wait until it answers."""
        words = shlex.split(command)[1:]
        server = subprocess.Popen(
            [sys.executable, "-m", "lora_jax", *words], cwd=self.folder, env=environment()
        )
        self.servers.append(server)
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return
            assert server.poll() is None, command
            time.sleep(0.2)
        raise AssertionError(f"{command}: does not answer")

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def check_data(block: Block) -> None:
    """A block of data is what its language says; of a run's config, with keys that there are."""
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "jsonl":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    elif block.language == "yaml":
        usual: dict[str, Any] = {"data": {"train": "rows.jsonl"}, "output": "runs/mine"}
        raw = yaml.safe_load(block.text)
        merged = {**usual, **raw, "data": {**usual["data"], **raw.get("data", {})}}
        run_config(merged, [], f"{block.page.name}:{block.line}")
