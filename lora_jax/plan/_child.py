"""The process that compiles: a compiler may end its process, and is loaded before JAX starts."""

import contextlib
import ctypes
import json
import signal
import sys
from pathlib import Path

import jax

from .._errors import InputError, first_line
from ..train import parse_config
from ._compile import compile_plan
from ._targets import parse_target

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG, by which Linux ends a process whose parent has gone."""


def main(output: str) -> None:
    """Compile what standard input asks for, and write what comes of it to a file as JSON."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    request = json.load(sys.stdin)
    try:
        target = parse_target(request["target"])
        if target.platform == "tpu":
            # Takes under half the time of the default, and needs the same memory within 1 %.
            jax.config.update("jax_optimization_level", "O1")
        config = parse_config(request["text"], request["overrides"], request["where"])
        result = {"plan": compile_plan(config, target, request["at_most"])}
    except InputError as error:
        result = {"error": str(error)}
    except Exception as error:  # whatever JAX or a compiler meets is told in one line
        said = f"{type(error).__name__}: {first_line(error)}"
        result = {
            "error": f"{request['where']}: cannot be compiled for {request['target']}: {said}"
        }
    Path(output).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
