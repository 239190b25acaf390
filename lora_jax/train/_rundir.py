"""A run's directory: claimed once, never overwritten."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .._errors import InputError
from .._files import atomic_file, leftovers
from .._program import PROGRAM
from ._config import RunConfig, config_text, load_config
from ._hosts import once, several_hosts
from ._lock import LOCK_FILE, locked
from ._metrics import notice
from ._schema import to_plain

CONFIG_FILE = "config.yaml"
_FREE = {"train.learning_rate", "train.clip_norm", "train.offload_optimizer", "train.heartbeat"}
"""What may change when a run goes on: a loss that diverged, or full memory, calls for it."""
_FREE_SECTION = "mesh"
"""As may the devices it runs on."""
Resume = bool | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's directory, and whether the run was begun there before."""

    directory: Path
    begun: bool


@contextlib.contextmanager
def open_directory(config: RunConfig, resume: Resume) -> Iterator[Opened]:
    """The run's directory, with its config in it, held against other processes.

    Args:
        config: The run's.
        resume: Whether the run was begun there; "auto" looks.

    Raises:
        InputError: if the directory is not as `resume` says: held, finished, of another config.
    """
    with contextlib.ExitStack() as held:
        begun = once(lambda: held.enter_context(_held(config, resume)))
        yield Opened(Path(config.output), begun)


@contextlib.contextmanager
def _held(config: RunConfig, resume: Resume) -> Iterator[bool]:
    """Whether the run was begun before, while the directory is held."""
    directory = Path(config.output)
    _check(config, resume)  # before anything is touched
    with locked(directory):
        begun = _check(config, resume)
        if resume == "auto" and not begun:
            notice(f"{directory}: no run was begun here; starting one")
        for path in leftovers(directory):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with atomic_file(directory / CONFIG_FILE) as temporary:
            temporary.write_text(config_text(config), encoding="utf-8")
        yield begun


def _check(config: RunConfig, resume: Resume) -> bool:
    """Whether the run was begun before; an error if it cannot go on, or its place is taken."""
    begun = (Path(config.output) / CONFIG_FILE).exists() if resume == "auto" else resume
    (_refuse_to_resume if begun else _refuse_to_claim)(config)
    return begun


def _refuse_to_claim(config: RunConfig) -> None:
    """An error if the directory holds anything already."""
    directory = Path(config.output)
    if not _holds_something(directory):
        return
    what = "holds something already; "
    if finished(directory):
        what = "holds another run, which is finished: nothing to resume; "
    elif (directory / CONFIG_FILE).exists():
        what = "holds another run; add --resume to go on with it, or "
    raise InputError(
        f"{directory}: {what}write to another directory: --output {next_directory(directory)}"
    )


def _refuse_to_resume(config: RunConfig) -> None:
    """An error if there is no run, it is finished, or its config was another."""
    directory = Path(config.output)
    if not (directory / CONFIG_FILE).exists():
        raise InputError(f"{directory}: no run to resume here; leave --resume out to start one")
    if is_finished(config):
        raise InputError(
            f"{directory}: this run is finished; to train its result further, start another run"
            " with train.adapter (or model.path) set to what it left"
        )


def resume_command(directory: Path) -> str:
    """What goes on with a run."""
    together = " --distributed" if several_hosts() else ""
    return f"{PROGRAM} train {directory / CONFIG_FILE}{together} --resume"


def free_directory(config: RunConfig) -> Path:
    """The directory a config writes to, which must hold nothing.

    Raises:
        InputError: if it does.
    """
    directory = Path(config.output)
    if _holds_something(directory):
        raise InputError(
            f"{directory}: holds something already; write to another directory: --output"
            f" {next_directory(directory)}"
        )
    return directory


def is_finished(config: RunConfig) -> bool:
    """Whether this run has left its result.

    Raises:
        InputError: if a run of another config was begun there.
    """
    directory = Path(config.output)
    if not (directory / CONFIG_FILE).exists():
        return False
    kept = load_config(directory / CONFIG_FILE)
    # A run may have been moved, or be named by another path.
    kept = with_output(kept, Path(config.output))
    for where, old, new in _differences(to_plain(kept), to_plain(config)):
        if where not in _FREE and not where.startswith(_FREE_SECTION):
            raise InputError(
                f"{directory}: was started with {where} {old!r}, now it is {new!r}; resume with the"
                " same settings, or start another run"
            )
    return finished(directory)


def finished(directory: Path) -> bool:
    """Whether a run has left its result."""
    return (directory / "adapter").exists() or (directory / "model").exists()


def next_directory(directory: str | Path) -> Path:
    """The directory itself if it is free, else the first free one numbered from 2.

    Example:
        >>> next_directory("/nowhere/quickstart").as_posix()
        '/nowhere/quickstart'
    """
    directory, number = Path(directory), 2
    free = directory
    while _holds_something(free):
        free, number = directory.with_name(f"{directory.name}-{number}"), number + 1
    return free


def with_output(config: RunConfig, directory: Path) -> RunConfig:
    """The same run, written somewhere else."""
    return dataclasses.replace(config, output=str(directory))


def _holds_something(directory: Path) -> bool:
    """Whether there is more than what a process that was killed there may have left."""
    if not directory.is_dir():
        return directory.exists()
    return bool({*directory.iterdir()} - {directory / LOCK_FILE, *leftovers(directory)})


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(where, old, new)]
    keys = dict.fromkeys((*old, *new))
    found = [_differences(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys]
    return [difference for some in found for difference in some]
