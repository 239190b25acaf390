"""Checkpoints of a run: what its steps change, and its place in the data (orbax)."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .._errors import InputError, first_line
from ..optim._offload import to_space_of
from ._fingerprint import fingerprints
from ._metrics import notice
from ._rundir import next_directory

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_NO_STEP = 2**31 - 1
"""Above all steps."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: arrays after `step`, and their place in words (JSON)."""

    step: int
    tree: Any
    place: dict[str, Any]


class Checkpoints:
    """The checkpoints below one directory, the newest few kept.

    Orbax writes beside a checkpoint and renames, so one that was cut off is never taken for whole.
    What a disk loses or changes later shows in a digest of the place and a fingerprint of every
    array.  All processes of a run make the same calls.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        import orbax.checkpoint as ocp  # slow to import

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._directory, self._ocp = directory, ocp
        with _writing(directory):
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest step that was saved."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, place: dict[str, Any]) -> None:
        """Save a tree of arrays after a step, and `place` (JSON) beside it."""
        args: Any = self._ocp.args
        content = {"place": place, "arrays": _described(tree), "fingerprints": fingerprints(tree)}
        sealed = _sealed(content)
        items = {"state": args.StandardSave(_storable(tree)), "place": args.JsonSave(sealed)}
        with _writing(self._directory):
            self._manager.save(step, args=args.Composite(**items))

    def restore(self, like: Callable[[dict[str, Any]], Any]) -> Saved | None:
        """The newest checkpoint that is whole, if there is any; newer ones are moved aside.

        Args:
            like: From the place to arrays whose structure, types, memory and shardings count.

        Raises:
            InputError: if there are checkpoints, but all are broken, or one is of another model.
        """
        broken: dict[int, str] = {}
        while (step := self._newest_below(min(broken, default=_NO_STEP))) is not None:
            found = self._read(step, like)
            if isinstance(found, Saved):
                self._set_aside(broken, step)
                return found
            broken[step] = found
        if broken:
            what = "; ".join(f"{step}: {problem}" for step, problem in broken.items())
            raise InputError(
                f"{self._directory}: none is a whole checkpoint of this run ({what}); bring one"
                f" back from a copy, or remove {self._directory} to begin the run anew"
            )
        return None

    def close(self) -> None:
        """End orbax's threads."""
        with _quietly(), contextlib.suppress(OSError, ValueError):
            self._manager.close()

    def _newest_below(self, limit: int) -> int | None:
        """As the first process sees it: file systems that are shared may lag."""
        newest = max((step for step in self._manager.all_steps() if step < limit), default=-1)
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def _read(self, step: int, like: Callable[[dict[str, Any]], Any]) -> Saved | str:
        """A checkpoint, or in words what is wrong with it; all processes find the same."""
        found, problem = None, "another process cannot read it"
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_unless_left_behind, hook)
        with _quietly():
            try:
                found = self._load(self._directory.absolute() / str(step), like)
                sys.unraisablehook = hook
            except InputError:  # of another model, which all processes find
                raise
            # Orbax has no error of its own: a broken file shows as any of many kinds.  Its other
            # reads complain, each at length, whenever they are collected, so the hook stays.
            except Exception as error:
                problem = first_line(error)
        if not multihost_utils.process_allgather(np.asarray(found is not None)).all():
            return problem
        assert found is not None
        tree, content = found
        same = [a == b for a, b in zip(fingerprints(tree), content["fingerprints"], strict=True)]
        if not all(same):
            return f"{same.count(False)} of {len(same)} arrays are not what was saved"
        return Saved(step, tree, content["place"])

    # By handlers rather than by the manager, which waits for processes that failed to read.
    def _load(self, path: Path, like: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        ocp = self._ocp
        content = ocp.JsonCheckpointHandler().restore(path / "place", args=ocp.args.JsonRestore())
        if content != _sealed({k: v for k, v in content.items() if k != "digest"}):
            raise ValueError("its place is not what was saved")
        wanted = like(content["place"])
        _check_kind(path, content["arrays"], _described(wanted))
        stored = ocp.StandardCheckpointHandler().restore(
            path / "state", args=ocp.args.StandardRestore(_storable(wanted))
        )
        leaves, structure = jax.tree.flatten(wanted)
        restored = [
            jax.random.wrap_key_data(stored[str(i)], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else stored[str(i)]
            for i, leaf in enumerate(leaves)
        ]
        # Orbax puts arrays into host memory where they are wanted there, but types them as if they
        # were on the device.
        return to_space_of(jax.tree.unflatten(structure, restored), wanted), content

    def _set_aside(self, broken: dict[int, str], good: int) -> None:
        """Keep what is broken under another name: its step will be saved again."""
        for step, problem in broken.items():
            path = self._directory / str(step)
            aside = next_directory(path.with_name(f"{step}.broken"))
            notice(f"{path}: not whole ({problem}), kept as {aside.name}; step {good} is taken")
            if jax.process_index() == 0:
                with _writing(self._directory):
                    path.rename(aside)
        if broken:
            multihost_utils.sync_global_devices("broken checkpoints moved aside")
            self._manager.reload()


def _described(tree: Any) -> dict[str, str]:
    """Type and shape of every array, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves)
    return {name: f"{x.dtype}{list(x.shape)}" for name, (_, x) in zip(names, leaves, strict=True)}


def _check_kind(path: Path, saved: dict[str, str], own: dict[str, str]) -> None:
    """Refuse a checkpoint of other arrays: no older one would be of this run."""
    for name in {**saved, **own}:
        if saved.get(name) != own.get(name):
            raise InputError(
                f"{path}: is of another model or adapter: {name} is {saved.get(name, 'missing')},"
                f" here it is {own.get(name, 'missing')}; resume with the model and the settings it"
                " was trained with, or write to another directory"
            )


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON with a digest of itself."""
    text = json.dumps(content, sort_keys=True)
    return {**json.loads(text), "digest": hashlib.sha256(text.encode()).hexdigest()}


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
        known = (os.strerror(number) for number in _NO_ROOM if os.strerror(number) in str(error))
        reason = getattr(error, "strerror", None) or next(known, first_line(error))
        raise InputError(f"{directory}: cannot write: {reason}") from error


def _unless_left_behind(hook: Any, error: Any) -> None:
    """Pass an error on, but for those of orbax's other reads and writes, which nobody awaits."""
    if not str(error.exc_value).startswith(("Event loop is closed", "Encountered error while rea")):
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
