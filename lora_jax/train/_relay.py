"""The way to the coordinator, which holds on when the coordinator is gone."""

import contextlib
import socket
import threading
from collections.abc import Callable


class Relay:
    """Carries what JAX and the coordinator (process 0) say to each other.

    JAX's client aborts its process, with a trace of C++, as soon as its connection breaks.  The one
    through here never does: `lost` is called instead, and can end the process with a reason.

    Args:
        address: `host:port` of the coordinator.
        lost: Called once the coordinator has closed a connection, by a thread of its own.
    """

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        host, _, port = address.rpartition(":")
        self._far, self._lost = (host.strip("[]"), int(port)), lost
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.answered = False
        """Whether the coordinator was ever reached."""
        _start(self._accept)

    @property
    def address(self) -> str:
        """What to tell JAX."""
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            _start(self._carry, near)

    def _carry(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._far, timeout=30)
        except OSError:  # not there yet: JAX tries again
            near.close()
            return
        self.answered = True
        self._open.append(near)
        far.settimeout(None)
        _start(_copy, near, far)
        _copy(far, near)
        self._lost()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Bytes as they come, until one side ends; the other side is told, but not cut off."""
    with contextlib.suppress(OSError):
        while block := source.recv(1 << 16):
            target.sendall(block)


def _start(run: Callable[..., None], *args: socket.socket) -> None:
    threading.Thread(target=run, args=args, daemon=True).start()
