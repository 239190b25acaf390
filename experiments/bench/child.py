"""A case in a process of its own, which sleeps in `read` between the steps it is asked for.

torch's threads spin while they wait for each other, and peak memory is a process's: so no two
cases share one.  Requests and replies are lines of JSON; whatever libraries print goes to a log.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
PATIENCE = 1800.0
"""Seconds after which a child that does not answer counts as failed."""


class CaseError(Exception):
    """A child could not do what it was asked; one line says why."""


@dataclasses.dataclass
class Case:
    """What a child holds: a step that returns its loss, and what is known beforehand."""

    step: Callable[[], Any]
    reference: float | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    finish: Callable[[Any], Any] = lambda result: result
    """Waits until a step's result is there."""
    device_peak: Callable[[], int | None] = lambda: None
    """Most bytes ever in use on an accelerator."""


class Child:
    """The parent's end of one case."""

    def __init__(self, module: str, name: str, spec: dict[str, Any], threads: int) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), module, name, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=_environment(threads, spec.get("env", {})),
            preexec_fn=lambda: machine.pin(threads),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str, **values: Any) -> Any:
        """The child's answer; raises CaseError where it has none."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"do": what, **values}) + "\n")
        ready, _, _ = select.select([stdout], [], [], PATIENCE)
        line = stdout.readline() if ready else ""
        if not line:
            raise CaseError(f"{self.name}: no answer to {what!r}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise CaseError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"ended by signal {-code}"
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _environment(threads: int, more: dict[str, str]) -> dict[str, str]:
    """As many threads for torch as for XLA, and the repository's own lora_jax."""
    counts = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NPROC": threads}
    path = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    # A cache of the caller's would make compile times and peaks depend on earlier runs.
    own = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return {
        **own,
        **{name: str(count) for name, count in counts.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TOKENIZERS_PARALLELISM": "false",
        # As `./lora` has it, for everybody.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def main() -> None:
    """Serve one case until standard input is closed."""
    module, name, spec = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case: Case | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                built: Case = importlib.import_module(module).CASES[name](spec)
                answer, case = _first_steps(built, request["gate"]), built
            else:
                assert case is not None
                answer = {"step": _step, "memory": _memory}[request["do"]](case)
            reply = {"answer": answer}
        except Exception as error:  # reported to the parent, which decides
            text = (str(error).strip() or "no message").splitlines()[0]
            reply = {"error": f"{type(error).__name__}: {text[:300]}"}
        replies.write(json.dumps(reply) + "\n")


def _first_steps(case: Case, count: int) -> dict[str, Any]:
    """The losses that the gate compares; these steps warm up too."""
    losses = [float(case.finish(case.step())) for _ in range(count)]
    return {"losses": losses, "reference": case.reference, "facts": case.facts}


def _step(case: Case) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    start = time.perf_counter(), time.process_time()
    case.finish(case.step())
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _memory(case: Case) -> dict[str, int]:
    """Bytes: peak of the process's life, resident between two steps, and peak within one."""
    life = machine.peak_resident()
    machine.forget_peak()
    before = machine.resident()
    case.finish(case.step())
    peaks = {"life": life, "resident": before, "step": machine.peak_resident()}
    device = case.device_peak()
    return peaks if device is None else peaks | {"device": device}


if __name__ == "__main__":
    main()
