"""What the program shows when it is given no command: the newest runs, and what to do next."""

import dataclasses
import fcntl
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .._program import PROGRAM

_SHOWN = 3
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_BROKEN += (yaml.YAMLError,)
_BEGIN = f"""No runs here yet. This trains the model that comes along, and shows the effect:

  {PROGRAM} quickstart

With rows of your own, look at how the model will see them, then train on them:

  {PROGRAM} data show rows.jsonl
  {PROGRAM} train CONFIG.yaml --data.train rows.jsonl --output runs/mine
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """A run or a sweep, in a line, and the commands that go on from there."""

    directory: Path
    state: str
    commands: Sequence[str]


def home(folder: Path, known: Sequence[str]) -> Iterator[str]:
    """Paragraphs: the newest runs below a folder, each with the commands that go on.

    A file that is broken hides its run, and nothing is imported that takes long.

    Args:
        folder: Where the program is called.
        known: The names of its commands.
    """
    runs = _newest_runs(folder)
    if not runs:
        yield _BEGIN
    for run in runs:
        there = [command for command in run.commands if command.split()[0] in known]
        if run is not runs[0]:
            del there[1:]
        yield "\n".join([f"{run.directory}: {run.state}", *(f"  {PROGRAM} {c}" for c in there), ""])
    if len(runs) > 1 and "compare" in known:
        yield f"  {PROGRAM} compare {' '.join(_word(run.directory) for run in runs)}\n"
    yield f"{PROGRAM} --help lists all commands, {PROGRAM} COMMAND --help what one takes."


def _newest_runs(folder: Path) -> list[Found]:
    """The runs and sweeps that were written to last."""
    files = [
        file
        for place in ("runs/*", "*")
        for name in ("metrics.jsonl", "sweep.jsonl")
        for file in folder.glob(f"{place}/{name}")
    ]
    found = []
    for file in sorted(files, key=lambda file: -file.stat().st_mtime):
        try:
            found.append((_sweep if file.name == "sweep.jsonl" else _run)(file))
        except _BROKEN:
            continue
        if len(found) == _SHOWN:
            break
    return found


def _run(metrics: Path) -> Found:
    directory, records = metrics.parent, _records(metrics)
    config = yaml.safe_load((directory / "config.yaml").read_text("utf-8"))
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    result = next((d for name in ("adapter", "model") if (d := directory / name).exists()), None)
    if result is None:
        again = f"train {_word(directory / 'config.yaml')} --resume"
        saved = [int(d.name) for d in (directory / "checkpoints").glob("*") if d.name.isdecimal()]
        if _is_held(directory):
            return Found(directory, f"training, at step {records[-1]['step']}", ())
        where = f"saved at step {max(saved)}" if saved else "with nothing saved yet"
        return Found(directory, f"stopped, {where}", (again,))
    after = min(losses[1:]) if config["train"]["patience"] else losses[-1]
    uses = [f"report {_word(directory)}", *_uses(directory, result, config)]
    return Found(directory, f"finished, held-out loss {losses[0]:.4f} → {after:.4f}", uses)


def _uses(directory: Path, result: Path, config: Mapping[str, Any]) -> list[str]:
    """What can be done with a finished run."""
    look = f"evaluate {_word(directory)}"
    if result.name == "model":
        return [look, f"chat {_word(result)}", f"serve {_word(result)}"]
    own = directory / "base"
    base, adapter = _word(own if own.exists() else config["model"]["path"]), _word(result)
    uses = [look, f"chat {base} --adapter {adapter}", f"serve {base} --adapter {adapter}"]
    merged = directory / "merged"
    if not merged.exists():
        uses.append(f"merge --model {base} --adapter {adapter} --output {_word(merged)}")
    return uses


def _sweep(records: Path) -> Found:
    directory = records.parent
    losses = [record["loss"] for record in _records(records) if record["loss"] is not None]
    best = f", the best held-out loss {min(losses):.4f}" if losses else ""
    adapter = directory / "best" / "adapter"
    config = yaml.safe_load((directory / "best" / "config.yaml").read_text("utf-8"))
    uses = _uses(directory / "best", adapter, config)
    return Found(directory, f"a sweep of {len(_records(records))} adapters{best}", uses)


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last may have been cut off."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _is_held(directory: Path) -> bool:
    """Whether a process trains there now."""
    try:
        with open(directory / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _word(path: Path | str) -> str:
    return shlex.quote(str(path))
