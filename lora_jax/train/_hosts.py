"""Several processes that train one run: how they find each other, agree, and take turns."""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from .._errors import InputError
from .._files import reported
from .._interrupt import StopRequest
from ._config import RunConfig
from ._relay import Relay
from ._schema import to_plain
from ._watch import Disagreement, Watch

_FIX = (
    "start one process on each host with JAX_COORDINATOR_ADDRESS=HOST:PORT (process 0's),"
    " JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)
_PROGRAMS = ("jax", "jaxlib", "flax", "optax")
_WAIT = 3600 * 1000
_LAG = 30.0
"""Seconds that another host's view of a shared file system may lag."""
_rounds = itertools.count()


@contextlib.contextmanager
def join_hosts(timeout: float = 300) -> Iterator[Watch]:
    """Make this process one of those that train a run together, before JAX is used.

    Slurm, Cloud TPU, Kubernetes and Open MPI say by themselves who is who; elsewhere the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.  Inside, an error
    in one process ends all, and each says whose it was.

    Args:
        timeout: Seconds to wait for the others.

    Returns:
        The watch over the others; its `begin` also notices who dies or hangs.

    Raises:
        InputError: if nothing says who is who, or JAX is in use already.
    """
    watch = _join(timeout)
    try:
        yield watch
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # a stop that all have agreed on
            _leave(watch)
            raise
        watch.fail(error)
        raise
    _leave(watch)


def _leave(watch: Watch) -> None:
    watch.leave()
    jax.distributed.shutdown()


def _join(timeout: float) -> Watch:
    address, count, process, devices = _cluster(timeout)
    joined: list[Watch] = []
    relay = Relay(address, lambda: [watch.lost() for watch in joined] and None)
    late = threading.Timer(timeout, _give_up, (relay, address, process, count))
    late.daemon = True
    late.start()
    if any(name in os.environ for name in ("grpc_proxy", "http_proxy", "https_proxy")):
        # None stands between this process and its own relay.
        os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    try:
        jax.distributed.initialize(
            address if process == 0 else relay.address,
            count,
            process,
            devices,
            # JAX would abort with a trace: `late` and the watch are to be first.
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=24 * 3600,
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if "must be called before" in first or "only be called once" in first:
            first = "JAX is in use already; join before anything is computed"
        raise InputError(f"--distributed: process {process} of {count}: {first}") from None
    watch = Watch(distributed.global_state.client, process, count)
    joined.append(watch)
    late.cancel()
    return watch


def _cluster(timeout: float) -> tuple[str, int, int, Any]:
    """The coordinator's address, how many processes there are, which is this one, its devices."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, process = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        address, count, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, process, None, None, int(timeout)
        )
    except Exception as error:  # each kind of cluster fails in its own way
        raise InputError(f"--distributed: no cluster found ({error}); {_FIX}") from None
    given = (address, count, process)
    if address is None or count is None or process is None:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name, value in zip(names, given, strict=True) if value is None]
        raise InputError(f"--distributed: no cluster found, nor {', '.join(missing)}; {_FIX}")
    if not address.rpartition(":")[2].isdecimal():
        raise InputError(f"JAX_COORDINATOR_ADDRESS: must be HOST:PORT, got {address!r}")
    if not 0 <= process < count:
        raise InputError(
            f"JAX_PROCESS_ID: must be from 0 to {count - 1}, as JAX_NUM_PROCESSES is {count}, got"
            f" {process}"
        )
    return address, count, process, devices


def _number(name: str) -> int | None:
    word = os.environ.get(name)
    if word is None or word.isdecimal():
        return None if word is None else int(word)
    raise InputError(f"{name}: must be a number, got {word!r}")


def _give_up(relay: Relay, address: str, process: int, count: int) -> None:
    if process == 0 or relay.answered:
        problem = f"not all {count} have come to {address}"
    else:
        problem = f"no coordinator answers at {address}"
    print(f"error: --distributed: process {process} of {count}: {problem}; {_FIX}",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(2)


def is_first() -> bool:
    """Whether this process writes what is written once: the only one, or process 0."""
    return jax.process_index() == 0


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
    if jax.process_count() == 1:
        return act()
    key = f"lora/once/{next(_rounds)}"
    if is_first():
        _client().key_value_set(key, json.dumps(act()))
    return json.loads(_client().blocking_key_value_get(key, _WAIT))


def _meet() -> None:
    _client().wait_at_barrier(f"lora/meet/{next(_rounds)}", _WAIT)


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
    host = _client().blocking_key_value_get(f"lora/host/{other}", _WAIT)
    return Disagreement(
        f"process {other} ({host}): {where} is {own.get(where)!r}, process 0 has"
        f" {first.get(where)!r}; {fix}"
    )


def agree_on_config(config: RunConfig) -> None:
    """Make sure that all processes run the same program with the same config."""
    programs = {name: version(name) for name in _PROGRAMS}
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
        InputError: in a process that does not.
    """
    if jax.process_count() == 1:
        return
    path = directory.parent / once(lambda: _touched_beside(directory))
    end = time.monotonic() + _LAG
    while not path.exists():
        if time.monotonic() > end:
            raise InputError(
                f"output: {directory} here is not the directory that process 0 writes to; give one"
                " that all hosts share"
            )
        time.sleep(0.1)
    _meet()
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
        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._steps)


@contextlib.contextmanager
def agreed_stop() -> Iterator[AgreedStop]:
    """As `stop_signals`, for several processes; Ctrl-C is taken as SIGTERM, the second at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before or signal.SIG_DFL)
        print("stopping after this step; once more stops at once", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield AgreedStop()
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
    """A tree whose arrays this process can read, even where others hold parts of them."""

    def read(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(read, tree)


def _client() -> Any:
    return distributed.global_state.client
