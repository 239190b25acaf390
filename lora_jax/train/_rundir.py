"""A run's directory: claimed once, never overwritten."""

import dataclasses
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._files import atomic_file
from ._config import RunConfig, config_text, load_config
from ._schema import to_plain

CONFIG_FILE = "config.yaml"
_FREE = {"train.learning_rate", "train.clip_norm", "train.offload_optimizer", "train.heartbeat"}
"""What may change when a run goes on: a loss that diverged, or full memory, calls for it."""


def claim_directory(config: RunConfig) -> Path:
    """Make the run's directory and write the resolved config into it.

    Raises:
        InputError: if the directory holds anything already.
    """
    directory = Path(config.output)
    if _holds_something(directory):
        what = "holds something already; "
        if finished(directory):
            what = "holds another run, which is finished: nothing to resume; "
        elif (directory / CONFIG_FILE).exists():
            what = "holds another run; add --resume to go on with it, or "
        raise InputError(
            f"{directory}: {what}write to another directory: --output {next_directory(directory)}"
        )
    with atomic_file(directory / CONFIG_FILE) as temporary:
        temporary.write_text(config_text(config), encoding="utf-8")
    return directory


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


def reopen_directory(config: RunConfig) -> Path:
    """The directory of a run that is to go on; its config must be the same.

    Raises:
        InputError: if there is no run, it is finished, or the config differs.
    """
    directory = Path(config.output)
    if not (directory / CONFIG_FILE).exists():
        raise InputError(f"{directory}: no run to resume here; leave --resume out to start one")
    if finished(directory):
        raise InputError(
            f"{directory}: this run is finished; to train its result further, start another run"
            " with train.adapter (or model.path) set to what it left"
        )
    kept = load_config(directory / CONFIG_FILE)
    # A run may have been moved, or be named by another path.
    kept = with_output(kept, Path(config.output))
    for where, old, new in _differences(to_plain(kept), to_plain(config)):
        if where in _FREE:
            continue
        raise InputError(
            f"{directory}: was started with {where} {old!r}, now it is {new!r}; resume with the"
            " same settings, or start another run"
        )
    with atomic_file(directory / CONFIG_FILE) as temporary:
        temporary.write_text(config_text(config), encoding="utf-8")
    return directory


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
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(where, old, new)]
    keys = dict.fromkeys((*old, *new))
    found = [_differences(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys]
    return [difference for some in found for difference in some]
