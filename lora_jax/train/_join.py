"""How processes that train one run find each other."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import clusters, distributed

from .._errors import InputError
from .._interrupt import Stopped
from ._relay import Relay
from ._watch import Watch

_FIX = (
    "start one process on each host with JAX_COORDINATOR_ADDRESS=HOST:PORT (process 0's),"
    " JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)


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
        if isinstance(error, Stopped) and error.in_order:  # as all have agreed
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

    def lost() -> None:
        for watch in joined:
            watch.lost()

    relay = Relay(address, lost)
    if any(name in os.environ for name in ("grpc_proxy", "http_proxy", "https_proxy")):
        # None stands between this process and its own relay.
        os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    late = threading.Timer(timeout, _give_up, (relay, address, process, count))
    late.daemon = True
    late.start()
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
        joined.append(Watch(distributed.global_state.client, process, count))
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if "must be called before" in first or "only be called once" in first:
            first = "JAX is in use already; join before anything is computed"
        raise InputError(f"--distributed: process {process} of {count}: {first}") from None
    finally:
        late.cancel()
    return joined[0]


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
