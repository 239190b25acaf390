"""An engine behind HTTP, from the first byte read of a model to the last one answered."""

import contextlib
import dataclasses
import importlib
import math
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from .._errors import InputError, first_line
from .._interrupt import stops_at_once
from ..adapters import read_config
from ..models import Pretrained, bucket
from ._catalog import Catalog
from ._engine import Engine
from ._settings import ServerSettings

_SLOTS, _RANK = 8, 16
_LEAST_RANK = 8
_LENGTH = 4096
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BACKLOG = 2048


def asgi_app(
    engine: Engine,
    pretrained: Pretrained,
    adapters: Mapping[str, str | Path] | None = None,
    settings: ServerSettings | None = None,
) -> Any:
    """OpenAI's routes over an engine, for a server of your own.

    Args:
        engine: What answers; closing it is its owner's.
        pretrained: Its base.
        adapters: Directories by the names that clients use; none of them may be loaded already.
        settings: What clients may do.

    Raises:
        InputError: if an adapter does not fit.

    Example:
        >>> from lora_jax.models import bundled_model, load_pretrained
        >>> base = load_pretrained(bundled_model())
        >>> with Engine(base, max_rows=1, max_length=32, adapter_slots=0) as engine:
        ...     app = asgi_app(engine, base)
        >>> callable(app)
        True
    """
    return _app_module().make_app(
        _catalog(engine, pretrained, adapters or {}, settings or ServerSettings())
    )


def serve(
    load: Callable[[], Pretrained],
    adapters: Mapping[str, str | Path] | None = None,
    settings: ServerSettings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    say: Callable[[str], None] = print,
    access_log: bool = False,
    **sizes: Any,
) -> None:
    """Load a model and answer HTTP until SIGTERM or Ctrl-C, then finish what is in flight.

    Args:
        load: Gives the base; called once the port is known to be free.
        adapters: Directories by the names that clients use.
        settings: What clients may do.  Where only this machine reaches the server and there are no
            keys, its `hosts` are this machine's own names unless others are given.
        host: The address to listen at; 127.0.0.1 is reached from this machine alone.
        port: The port; 0 takes one that is free, which `say` tells.
        say: Called with lines for whoever started it.
        access_log: Whether each call is logged by address, route and status; prompts never are.
        sizes: Arguments of `Engine`; what is not given follows from the adapters (`room_for`), and
            `max_length` is no more than 4096 unless it is given.

    Raises:
        InputError: if the address cannot be used, an adapter does not fit, a size is wrong, or the
            device has no room.
    """
    uvicorn = _package("uvicorn")
    _app_module()
    settings, adapters = settings or ServerSettings(), adapters or {}
    if host in _LOOPBACK and not settings.hosts and not settings.api_keys:
        settings = dataclasses.replace(settings, hosts=(*_LOOPBACK, "[::1]"))
    sizes = room_for(adapters, settings) | sizes
    with _bound(host, port) as listener, contextlib.ExitStack() as stack:
        address = _address(host, listener)
        if host not in _LOOPBACK and not settings.api_keys:
            say(f"note: whoever reaches {address} can use it; an API key file closes it")
        with stops_at_once("stopped before it answered anything"):
            say("loading the model and compiling its programs")
            pretrained = load()
            if "max_length" not in sizes and pretrained.config.context_length > _LENGTH:
                # Every row has as much of the cache as the longest request may need.
                sizes["max_length"] = _LENGTH
                say(
                    f"note: requests have at most {_LENGTH} tokens, where the model was made for"
                    f" {pretrained.config.context_length}; max_length changes it"
                )
            engine = stack.enter_context(_engine(pretrained, sizes))
            app = asgi_app(engine, pretrained, adapters, settings)
        config = uvicorn.Config(
            app, lifespan="off", log_level="info" if access_log else "warning",
            access_log=access_log, server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.timeout) + 5,
        )  # fmt: skip
        names = ", ".join([settings.base_name, *adapters])
        # As uvicorn does a little later: whoever calls once this is said has to get through.
        listener.listen(_BACKLOG)
        say(f"serving {names} at {address} (Ctrl-C stops, after what is in flight)")
        # uvicorn ends in order after a signal, and then raises it again.
        with stops_at_once("stopped"):
            uvicorn.Server(config).run(sockets=[listener])


def _engine(pretrained: Pretrained, sizes: Mapping[str, Any]) -> Engine:
    try:
        return Engine(pretrained, **sizes)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"serve: the device has no room: {first_line(error)}; lower max_rows, max_length or"
            " adapter_slots, or quantize the base"
        ) from None


def room_for(adapters: Mapping[str, str | Path], settings: ServerSettings) -> dict[str, Any]:
    """Sizes of an engine for these adapters, and for others if clients may load some.

    Ranks are rounded up to a power of two, so that adapters of other ranks share the programs.

    Raises:
        InputError: if an adapter's config cannot be read.

    Example:
        >>> room_for({}, ServerSettings())
        {'adapter_slots': 0}
    """
    configs = [read_config(Path(directory)) for directory in adapters.values()]
    if settings.adapter_root is None and not configs:
        return {"adapter_slots": 0}
    ranks = [max([config.r, *(config.rank_pattern or {}).values()]) for config in configs]
    sizes: dict[str, Any] = dict(use_dora=any(config.use_dora for config in configs))
    if settings.adapter_root is not None:
        return sizes | dict(
            adapter_slots=_SLOTS, max_rank=bucket(max([_RANK, *ranks]), _LEAST_RANK, 1)
        )
    named = [config.target_modules for config in configs]
    lists = [names for names in named if isinstance(names, list | tuple)]
    if len(lists) == len(named):
        sizes["target_modules"] = sorted({name for names in lists for name in names})
    return sizes | dict(
        adapter_slots=min(len(configs), _SLOTS), max_rank=bucket(max(ranks), _LEAST_RANK, 1)
    )


def _app_module() -> Any:
    """The routes, whose packages come with an extra."""
    for name in ("starlette", "jsonschema_rs", "prometheus_client"):
        _package(name)
    from . import _app

    return _app


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != name:
            raise
        raise InputError(
            f"serve: needs {name}, which is not installed; pip install 'lora_jax[serve]'"
        ) from None


def _catalog(
    engine: Engine,
    pretrained: Pretrained,
    adapters: Mapping[str, str | Path],
    settings: ServerSettings,
) -> Catalog:
    catalog = Catalog(engine, pretrained, settings)
    for name, directory in adapters.items():
        catalog.add(name, directory)
    return catalog


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything that takes long."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: cannot listen there: {reason}; give another port"
        ) from None
    return made


def _address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
