"""Checkpoints of a run: what its steps change, and its place in the data (orbax)."""

import contextlib
import errno
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import InputError
from ..optim._offload import to_space_of


class Checkpoints:
    """The checkpoints below one directory, the newest few kept.

    A checkpoint that was cut off while it was written is never taken for a whole one: orbax
    writes beside it and renames.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        import orbax.checkpoint as ocp  # slow to import

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._directory, self._args = directory, ocp.args
        with _writing(directory):
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, place: dict[str, Any]) -> None:
        """Save a tree of arrays after a step, and `place` (JSON) beside it."""
        args: Any = self._args
        items = {"state": args.StandardSave(_storable(tree)), "place": args.JsonSave(place)}
        with _writing(self._directory):
            self._manager.save(step, args=args.Composite(**items))

    def place(self) -> dict[str, Any]:
        """The `place` of the newest checkpoint."""
        return self._restore(place=self._args.JsonRestore())["place"]

    def restore(self, like: Any) -> Any:
        """The tree of the newest checkpoint, in the structure, types and memory of `like`.

        Raises:
            InputError: if it is broken, or holds another structure.
        """
        args: Any = self._args
        stored = self._restore(state=args.StandardRestore(_storable(like)))["state"]
        leaves, structure = jax.tree.flatten(like)
        restored = [
            jax.random.wrap_key_data(stored[str(i)], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else stored[str(i)]
            for i, leaf in enumerate(leaves)
        ]
        # Orbax puts arrays into host memory where `like` has them there, but types them as if they
        # were on the device.
        return to_space_of(jax.tree.unflatten(structure, restored), like)

    def close(self) -> None:
        """End orbax's threads."""
        with _quietly(), contextlib.suppress(OSError, ValueError):
            self._manager.close()

    def _restore(self, **items: Any) -> Any:
        step = self.latest()
        try:
            with _quietly():
                return self._manager.restore(step, args=self._args.Composite(**items))
        # Orbax has no error of its own: a broken file shows as any of many kinds.
        except Exception as error:
            first = str(error).strip().split("\n")[0][:200]
            raise InputError(
                f"{self._directory / str(step)}: not a whole checkpoint of this run ({first});"
                " remove that directory to resume from the one before"
            ) from error


def _storable(tree: Any) -> dict[str, Any]:
    """The leaves in order; a typed key is stored as its words."""
    leaves = jax.tree.leaves(tree)
    return {
        str(i): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for i, leaf in enumerate(leaves)
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """A full disk in one line; tensorstore reports it as a ValueError."""
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unless_left_behind, hook)
    try:
        with _quietly():
            yield
        sys.unraisablehook = hook
    except (OSError, ValueError) as error:
        # What a failed save leaves behind complains until the process ends, so the hook stays.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:200]
        full = os.strerror(errno.ENOSPC)
        reason = full if full in str(error) else reason
        raise InputError(f"{directory}: cannot write: {reason}") from error


def _unless_left_behind(hook: Any, error: Any) -> None:
    """Pass an error on, but for that of orbax's other writes, whose event loop has ended."""
    if str(error.exc_value) != "Event loop is closed":
        hook(error)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Orbax narrates every save, and logs a traceback beside every error it raises."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
