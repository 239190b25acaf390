"""Processes that train one run together, as hosts do; forked, since importing costs most."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LIMIT = 120
"""Seconds: whoever is not done by then hangs."""


class Processes:
    """Started processes, their output, and how they ended.

    Args:
        words: The command line of each.
        directory: Where their output goes.
        devices: CPU devices of each.
        trouble: Called in each before it trains, with its number.
    """

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        directory: Path,
        devices: int = 2,
        trouble: Callable[[int], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.train.processes", "lora_jax.cli", "lora_jax.train"])
        directory.mkdir()
        self.files = [directory / f"{i}.txt" for i in range(len(words))]
        address = f"127.0.0.1:{free_port()}"
        self.processes = [
            context.Process(
                target=_train, args=(own, i, len(words), address, devices, file, trouble)
            )
            for i, (own, file) in enumerate(zip(words, self.files, strict=True))
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, path: Path, lines: int) -> None:
        """Wait until a file has so many lines."""
        end = time.monotonic() + LIMIT
        while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            assert time.monotonic() < end and all(p.is_alive() for p in self.processes), self.said()
            time.sleep(0.05)

    def send(self, number: signal.Signals, to: int) -> None:
        pid = self.processes[to].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, *but: int) -> list[int | None]:
        """The exit codes of all, or of all but some that are then killed."""
        end = time.monotonic() + LIMIT
        for i, process in enumerate(self.processes):
            if i not in but:
                process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [code for i, code in enumerate(codes) if i not in but]

    def said(self) -> list[list[str]]:
        """The lines of each, without those that are about connections alone."""
        texts = [file.read_text() if file.exists() else "" for file in self.files]
        return [[line for line in text.splitlines() if "peer ranks" not in line] for text in texts]

    def errors(self) -> list[list[str]]:
        """Of those, the ones that say why it ended."""
        return [[line for line in lines if line.startswith("error: ")] for lines in self.said()]


def _train(words, process, count, address, devices, file, trouble) -> None:
    with open(file, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flags
    os.environ["JAX_COORDINATOR_ADDRESS"] = address
    os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PROCESS_ID"] = str(count), str(process)
    if trouble is not None:
        trouble(process)
    from lora_jax.cli import main

    main([*words, "--distributed"])


def before_step(act: Callable[[int], None]) -> None:
    """Call something with the number of every step that this process takes."""
    from lora_jax.train import _loop

    step = _loop._Loop._one_step

    def other(self, at: int) -> None:
        act(at)
        step(self, at)

    _loop._Loop._one_step = other


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
