"""A grid of runs, those over the same base trained in one step."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .._config import LoraConfig
from .._errors import InputError
from .._files import atomic_directory, atomic_file
from .._interrupt import Stopped, StopRequest, stop_signals
from ._config import RunConfig, TrainSection, config_text, load_config
from ._job import Job, prepare, prepare_abstract, prepare_beside
from ._metrics import notice
from ._rundir import CONFIG_FILE, free_directory, with_output
from ._save import save_result
from ._schema import to_plain
from ._together import Outcome, train_together

SWEEP_FILE, BEST = "sweep.jsonl", "best"
SMALLEST_BUCKET = 16
"""Ranks up to this are padded to it: narrower factors are no faster."""
Word = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a grid: what is varied, `{"lora.r": 4}`, and the whole config."""

    varied: Mapping[str, Any]
    config: RunConfig


def split_grid(words: Sequence[str]) -> tuple[list[str], list[list[Word]]]:
    """Words with one value, and for every word with several its values.

    Values stand between commas; those within brackets or quotes part nothing.

    Raises:
        InputError: for a word without a value.

    Example:
        >>> split_grid(["--lora.r", "4,8", "--train.steps=5"])
        (['--train.steps', '5'], [[('--lora.r', '4'), ('--lora.r', '8')]])
    """
    single: list[str] = []
    several: list[list[Word]] = []
    words = list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{name}: the value is missing; write {name} VALUE,VALUE")
            value = words.pop(0)
        values = _parts(value)
        if len(values) == 1:
            single += [name, value]
        else:
            several.append([(name, part) for part in dict.fromkeys(values)])
    return single, several


def _parts(value: str) -> list[str]:
    """What stands between commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def grid(path: str | Path, words: Sequence[str]) -> list[Member]:
    """The runs of a config with every combination of the values that words give.

    Raises:
        InputError: if no key has several values, or a combination is no config.
    """
    single, several = split_grid(words)
    if not several:
        raise InputError(
            "sweep: give a key several values between commas, as in --lora.r 4,8,16"
            " --train.learning_rate 1e-4,3e-4"
        )
    names = [choices[0][0].removeprefix("--").replace("-", "_") for choices in several]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"sweep: --{twice[0]} is given twice; write its values in one list")
    if "output" in names:
        raise InputError("sweep: --output has several values; all results go to one directory")
    members = []
    for choice in itertools.product(*several):
        config = load_config(path, [*single, *(word for pair in choice for word in pair)])
        if config.train.method != "lora":
            raise InputError("sweep: train.method must be lora; only adapters share a base")
        plain = to_plain(config)
        members.append(Member({name: _value(plain, name) for name in names}, config))
    return members


def _value(plain: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        plain = plain[name]
    return plain


def batches_of_members(members: Sequence[Member], at_once: int) -> list[list[Member]]:
    """Members that can be trained in one step, at most so many, in the order of the grid.

    They share base, rows and everything that shapes a step; rank, alpha, learning rate, seed and
    the start of the adapter are each one's own, unless that moves the base or chooses ranks by
    data.  Ranks are padded to a bucket, a power of two.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(_shared(member.config), []).append(member)
    starts = ((group, i) for group in groups.values() for i in range(0, len(group), at_once))
    return [group[i : i + at_once] for group, i in starts]


def _shared(config: RunConfig) -> str:
    """What members of one step have in common, as text."""
    lora, train = config.lora, config.train
    ranks = (lora.r, *lora.rank_pattern.values())
    # A step of 8-bit Adam sees blocks of numbers, which padding would shift.
    bucket = max(ranks) if train.optimizer == "adamw_8bit" else rank_bucket(max(ranks))
    plain = LoraConfig()
    own = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
    if not (lora.moves_base or lora.starts_from_data):
        neutral = {name: getattr(plain, name) for name in own}
        lora = dataclasses.replace(lora, **neutral)
        train = dataclasses.replace(
            train, seed=TrainSection.seed, learning_rate=TrainSection.learning_rate
        )
    text = config_text(dataclasses.replace(config, lora=lora, train=train, output=""))
    return f"rank {bucket}\n{text}"


def rank_bucket(rank: int) -> int:
    """The power of two that a rank is padded to.

    Example:
        >>> [rank_bucket(rank) for rank in (1, 16, 17, 64)]
        [16, 16, 32, 64]
    """
    return max(SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


def sweep(
    members: Sequence[Member],
    *,
    at_once: int = 8,
    tell: Callable[[dict[str, Any]], None] = lambda record: None,
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a grid and keep its best adapter.

    Args:
        members: As from `grid`; they write into one directory.
        at_once: How many adapters one step may train; each needs memory for its activations.
        tell: Called with every record as it is written.
        listener: Called after every step.

    Returns:
        The records of `sweep.jsonl`, one for each member: `varied`, `before`, `loss` (held-out,
        nats per token; None where it is no number), `step`, `tokens`, `trainable`, `together`,
        `seconds` (of its whole group) and `looks`.  On disk also `best/adapter` in PEFT's format
        and `best/config.yaml`, which trains it alone.

    Raises:
        InputError: for whatever does not fit.
        Stopped: after SIGTERM or Ctrl-C; what is finished stays.
    """
    if at_once < 1:
        raise InputError(f"sweep: at_once must be at least 1, got {at_once}")
    for member in members:  # before steps are spent on the others
        if member.config.train.adapter is None:
            prepare_abstract(member.config)
    directory = free_directory(members[0].config)
    records: list[dict[str, Any]] = []
    with stop_signals() as stop, _told(directory, records, len(members), stop):
        for group in batches_of_members(members, at_once):
            begin = time.perf_counter()
            jobs = _jobs(group)
            found = train_together(jobs, stop=stop, listener=listener)
            seconds = time.perf_counter() - begin
            for member, job, outcome in zip(group, jobs, found, strict=True):
                record = _record(member, job, outcome, len(group), seconds)
                if _is_best(record, records):
                    _keep(directory / BEST, job, outcome)
                records.append(record)
                _write(directory / SWEEP_FILE, records)
                tell(record)
    return records


def _jobs(group: Sequence[Member]) -> list[Job]:
    first = prepare(group[0].config)
    return [first, *(prepare_beside(member.config, first) for member in group[1:])]


def _record(
    member: Member, job: Job, outcome: Outcome, together: int, seconds: float
) -> dict[str, Any]:
    return {
        "varied": dict(member.varied),
        "before": outcome.before.loss,
        "loss": outcome.after.loss if math.isfinite(outcome.after.loss) else None,
        "step": outcome.steps,
        "tokens": outcome.after.tokens,
        "trainable": job.counts()["trainable"],
        "together": together,
        "seconds": round(seconds, 2),
        "looks": [[at, x if math.isfinite(x) else None] for at, x in outcome.looks],
    }


def _is_best(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    losses = [other["loss"] for other in others if other["loss"] is not None]
    return record["loss"] is not None and record["loss"] < min(losses, default=math.inf)


def _keep(best: Path, job: Job, outcome: Outcome) -> None:
    """The adapter and its config, in place of those that were the best before."""
    old = best.with_name(f".{best.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with atomic_directory(best.with_name(f".{best.name}.new")) as temporary:
        save_result(job, temporary, outcome.adapter)
        config = with_output(job.config, best)
        (temporary / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
    if best.exists():
        os.replace(best, old)
    os.replace(best.with_name(f".{best.name}.new"), best)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary:
        lines = (json.dumps(record) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def _told(directory: Path, records: Sequence[Any], count: int, stop: StopRequest) -> Iterator[None]:
    """Say how far a sweep came that ends early."""
    there = f"{directory}: {{}}; {{}} of {count} adapters are in {SWEEP_FILE}"
    try:
        yield
    except InputError as error:
        if stop.is_set():
            _end(there.format(error, len(records)), stop)
        raise InputError(there.format(error, len(records))) from None
    except OSError as error:
        why = f"cannot write: {error.strerror or error}"
        raise InputError(there.format(why, len(records))) from error
    except KeyboardInterrupt:
        _end(there.format("interrupted", len(records)), stop)


def _end(message: str, stop: StopRequest) -> NoReturn:
    message += "; sweep the others into another directory, with --output"
    notice(message)
    raise Stopped(message, stop.code or 130, in_order=False)
