"""Several runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._drawing import APART
from .._errors import InputError
from ._blocks import Block, Lines, Page, Picture, Section, Table, percent
from ._figures import smoothed, smoothing_width
from ._markdown import table
from ._plots import FEW, as_label, new_figure
from ._report import write_page
from ._run import Run, read_run

_NOTHING = "–"
_HIDDEN = ("output", "train.tensorboard", "train.samples")
"""Settings that decide nothing about what is learned."""


def compare_runs(directories: Sequence[str | Path], output: str | Path) -> tuple[str, Path]:
    """Write `compare.md`, its picture and `compare.html`: runs over each other.

    Args:
        directories: Those of two runs or more.
        output: Where to write.

    Returns:
        The table and what is to be known of it as plain text, and the path of `compare.md`.

    Raises:
        InputError: for fewer than two runs, one that cannot be read, or a place that cannot be
            written to.
    """
    if len(directories) < 2:
        raise InputError("compare: give the directories of two runs or more")
    runs = [read_run(directory) for directory in directories]
    page = compare_page(runs)
    numbers, notes = _table(runs), _notes(runs)
    text = "\n".join([table(numbers), *(f"note: {note}" for note in notes)])
    return text, write_page(page, Path(output), "compare")


def compare_page(runs: Sequence[Run]) -> Page:
    """What differs in the runs, and what came of it."""
    names, notes = _names(runs), _notes(runs)
    told: list[Block] = [Lines(notes)] if notes else []
    kept = ", ".join(
        f"{name} {run.kept['eval_loss']:.3f}"
        for name, run in zip(names, runs, strict=True)
        if run.kept
    )
    alt = f"Training and held-out loss of {len(runs)} runs over the steps; held out: {kept}"
    return Page(
        f"Comparison of {len(runs)} runs",
        lead=[*told, _table(runs), Picture(plot_runs(runs), "compare.png", alt)],
        sections=[
            Section(
                "The runs",
                [
                    Table(
                        ("", ""), [(n, str(r.directory)) for n, r in zip(names, runs, strict=True)]
                    )
                ],
            )
        ],
    )


def plot_runs(runs: Sequence[Run]) -> Any:
    """Training loss, smoothed, beside held-out loss: a colour for each run."""
    figure = new_figure(9, 4)
    training, held_out = figure.subplots(1, 2)
    for i, (name, run) in enumerate(zip(_names(runs), runs, strict=True)):
        style = {"color": APART[i % len(APART)], "linestyle": ("-", "--", ":")[i // len(APART) % 3]}
        steps, losses = run.line("loss")
        training.plot(
            steps, smoothed(losses, smoothing_width(len(losses))), label=as_label(name), **style
        )
        at, losses = run.line("eval_loss")
        marker = "o" if len(at) <= FEW else None
        held_out.plot(at, losses, marker=marker, markersize=4, **style)
    training.set(title="training, smoothed", xlabel="step", ylabel="loss (nats per trained token)")
    held_out.set(title="held out", xlabel="step")
    figure.legend(*training.get_legend_handles_labels(), frameon=False, fontsize="small",
                  loc="outside lower center", ncols=3)  # fmt: skip
    return figure


def _table(runs: Sequence[Run]) -> Table:
    """A column for each run: first what differs in its settings, then what came of it."""
    settings = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [
        key for key in keys
        if not key.startswith(_HIDDEN) and len({str(own.get(key)) for own in settings}) > 1
    ]  # fmt: skip
    rows = [(key, *(_short(own.get(key)) for own in settings)) for key in differing]
    found = [_numbers(run) for run in runs]
    rows += [(name, *(own[name] for own in found)) for name in found[0]]
    return Table(("", *_names(runs)), rows)


def _numbers(run: Run) -> dict[str, str]:
    """What came of a run, each number by its name."""
    looks, kept, best = run.looks, run.kept, run.best
    counts = run.about.get("counts", {})
    files = list((run.directory / "adapter").glob("*.safetensors"))
    numbers: dict[str, str | None] = {
        "held-out loss before": f"{looks[0]['eval_loss']:.4f}" if looks else None,
        "held-out loss after": f"{kept['eval_loss']:.4f}" if kept else None,
        "change": percent(kept["eval_loss"] / looks[0]["eval_loss"] - 1, "+.1f") if kept else None,
        "best": f"{best['eval_loss']:.4f} at step {best['step']:,}" if best else None,
        "steps": f"{run.steps[-1]['step']:,}" if run.steps else None,
        "tokens/s": f"{run.speed:,.0f}" if run.steps else None,
        "peak memory": f"{run.peak / 1e9:.2f} GB" if run.steps else None,
        "trainable parameters": f"{counts['trainable']:,}" if counts else None,
        "adapter's file": f"{sum(f.stat().st_size for f in files) / 1e6:.2f} MB" if files else None,
    }
    return {name: _NOTHING if number is None else number for name, number in numbers.items()}


def _notes(runs: Sequence[Run]) -> list[str]:
    """What makes numbers of different runs hard to compare."""
    named = zip(_names(runs), runs, strict=True)
    notes = [f"{name} is not finished{_so_far(run)}" for name, run in named if not _ended(run)]
    for part, losses in (("eval", "held-out"), ("train", "training")):
        digests = {run.about.get("data", {}).get(part, {}).get("digest") for run in runs}
        sources = {str(_source(run, part)) for run in runs}
        if len(digests - {None}) > 1 or len(sources) > 1:
            notes.append(
                f"the {losses} rows or their tokens differ: these losses are of other data"
            )
        elif None in digests:
            notes.append(f"not every run says which {losses} rows it read; only their files agree")
    return notes


def _ended(run: Run) -> bool:
    """Whether a run says so, has left its result, or has taken all its steps."""
    last = run.steps[-1] if run.steps else None
    whole = last is not None and last["step"] >= last["steps"]
    return "ended" in run.about or run.finished or whole


def _so_far(run: Run) -> str:
    last = run.steps[-1] if run.steps else None
    return "" if last is None else f" (step {last['step']:,} of {last['steps']:,})"


def _source(run: Run, part: str) -> Any:
    """Where rows come from: those set aside, from the training rows."""
    data = run.config["data"]
    return data.get(part) or (data["train"], data.get("eval_share"))


def _names(runs: Sequence[Run]) -> list[str]:
    """The directories' names, or their paths where two have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def _flat(raw: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return _NOTHING if value is None or value == {} else str(value)
