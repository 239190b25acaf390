"""Several processes that train one run: how they agree and take turns."""

import contextlib
import hashlib
import itertools
import json
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from .._files import package_digest, reported
from .._interrupt import STOPPING, StopRequest
from ._config import RunConfig
from ._schema import to_plain
from ._watch import Disagreement, leave_stops_to_steps

_PROGRAMS = ("jax", "jaxlib", "flax", "optax")
_WAIT = 3600 * 1000
_LAG = 30.0
"""Seconds that another host's view of a shared file system may lag."""
_rounds = itertools.count()


def is_first() -> bool:
    """Whether this process writes what is written once: the only one, or process 0."""
    return jax.process_index() == 0


def several_hosts() -> bool:
    """Whether this process trains together with others."""
    return jax.process_count() > 1


def once(act: Callable[[], Any]) -> Any:
    """Let process 0 do something while the others wait; if it fails, all end with its error.

    Args:
        act: What to do; returns something that JSON can hold.

    Returns:
        What it returned, in every process.

    Example:
        >>> once(lambda: 1 + 1)
        2
    """
    if not several_hosts():
        return act()
    key = f"lora/once/{next(_rounds)}"
    if is_first():
        _client().key_value_set(key, json.dumps(act()))
    return json.loads(_client().blocking_key_value_get(key, _WAIT))


def agree(own: Mapping[str, Any], fix: str) -> None:
    """Make sure that all processes hold the same values.

    Args:
        own: This process's, by names for the message.
        fix: What to do where they differ.

    Raises:
        InputError: in every process, with the first that differs from process 0.
    """
    if not jax.distributed.is_initialized():
        return
    plain = json.loads(json.dumps(own, default=str))
    # Few bytes from each to each; what they stand for is asked for only where they differ.
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    place, process = f"lora/agree/{next(_rounds)}", distributed.global_state.process_id
    _client().key_value_set(f"{place}/values/{process}", json.dumps(plain))
    _client().key_value_set(f"{place}/host/{process}", socket.gethostname())
    _client().key_value_set(f"{place}/digest/{process}", digest)
    _client().wait_at_barrier(f"{place}/all", _WAIT)
    digests = {
        int(key.rpartition("/")[2]): value
        for key, value in _client().key_value_dir_get(f"{place}/digest/")
    }
    for other in sorted(digests):
        if digests[other] != digests[0]:
            raise _disagreement(place, other, fix)


def _disagreement(place: str, other: int, fix: str) -> Disagreement:
    first, own = (
        json.loads(_client().blocking_key_value_get(f"{place}/values/{i}", _WAIT))
        for i in (0, other)
    )
    where = next(key for key in {**first, **own} if first.get(key) != own.get(key))
    host = _client().blocking_key_value_get(f"{place}/host/{other}", _WAIT)
    return Disagreement(
        f"process {other} ({host}): {where} is {own.get(where)!r}, process 0 has"
        f" {first.get(where)!r}; {fix}"
    )


def agree_on_config(config: RunConfig) -> None:
    """Make sure that all processes run the same program with the same config."""
    programs = {name: version(name) for name in _PROGRAMS}
    programs["lora_jax's source"] = package_digest()[:16]
    agree(programs, "install the same versions everywhere")
    agree(_flat(to_plain(config)), "start all processes with the same config")


def _flat(raw: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(raw, dict) or not raw:
        return {where: raw}
    parts = [_flat(value, f"{where}.{key}" if where else str(key)) for key, value in raw.items()]
    return {key: value for part in parts for key, value in part.items()}


def check_shared(directory: Path) -> None:
    """Make sure that all processes see what process 0 writes beside a directory.

    Args:
        directory: The run's, which need not exist yet.

    Raises:
        InputError: in every process, if one does not.
    """
    if not several_hosts():
        return
    path = directory.parent / once(lambda: _touched_beside(directory))
    end = time.monotonic() + _LAG
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    seen = {f"process 0's file beside {directory}": "there" if path.exists() else "missing"}
    try:
        agree(seen, "output has to be a directory that all hosts share")
    finally:
        if is_first():
            path.unlink()


def _touched_beside(directory: Path) -> str:
    with reported(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        path = directory.parent / f".{directory.name}.{secrets.token_hex(6)}"
        path.touch()
    return path.name


class AgreedStop(StopRequest):
    """SIGTERM to one process, taken by all after the same step.

    JAX listens for the signal from the beginning, and finds a step that nobody is beyond.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def is_set(self) -> bool:
        """To be asked once a step by every process."""
        leave_stops_to_steps()
        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._steps)


@contextlib.contextmanager
def agreed_stop() -> Iterator[AgreedStop]:
    """As `stop_signals`, for several processes: the first Ctrl-C is taken as SIGTERM."""
    asked = AgreedStop()

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before or signal.SIG_DFL)
        asked.code = 128 + number
        with contextlib.suppress(RuntimeError):  # in the midst of another write
            print(STOPPING, file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def largest(count: int) -> int:
    """The largest of what the processes have, rounded to 1,024.

    Example:
        >>> largest(2048)
        2048
    """
    kibi = np.uint32(count >> 10)  # JAX's integers have 32 bits
    return int(np.max(multihost_utils.process_allgather(kibi))) << 10


def whole(tree: Any) -> Any:
    """A tree whose arrays process 0 can read, even where others hold parts of them.

    All processes call this alike; in the others, what was gathered is None.
    """

    def read(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        gathered = multihost_utils.process_allgather(leaf, tiled=True)
        return gathered if is_first() else None

    return jax.tree.map(read, tree)


def _client() -> Any:
    return distributed.global_state.client
