"""A sweep as a table and a picture, from the file it left."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._drawing import COLOURS, GREY, save_figure
from .._errors import InputError
from ._plots import as_label

Record = Mapping[str, Any]


def read_sweep(directory: str | Path) -> list[dict[str, Any]]:
    """The records of a sweep's `sweep.jsonl`, in the order they were written.

    Raises:
        InputError: if there is no such file, or it is broken.
    """
    path = Path(directory) / "sweep.jsonl"
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read: {error}") from None


def sweep_table(records: Sequence[Record]) -> str:
    """The members of a sweep, the best first, as a table in Markdown.

    Example:
        >>> print(sweep_table([{"varied": {"lora.r": 4}, "loss": 2.0, "before": 2.5, "step": 9,
        ...                     "trainable": 512, "together": 3, "seconds": 1.5}]))
        | lora.r | held-out loss | change | trainable | kept at step |
        |---|---|---|---|---|
        | 4 | 2.0000 | -20.0 % | 512 | 9 |
    """
    names = list(records[0]["varied"])
    head = [*names, "held-out loss", "change", "trainable", "kept at step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in sorted(records, key=_loss):
        loss, before = record["loss"], record["before"]
        told = ["diverged", ""] if loss is None else [f"{loss:.4f}", f"{loss / before - 1:+.1%}"]
        values = [_short(record["varied"][name]) for name in names]
        cells = [*values, *told, f"{record['trainable']:,}", str(record["step"])]
        lines.append("| " + " | ".join(cells).replace("%", " %") + " |")
    return "\n".join(lines)


def draw_sweep(directory: str | Path) -> Path:
    """Draw held-out loss against rank, or whatever else was varied, into `sweep.png`.

    Ranks and learning rates stand on logarithmic axes; everything else that was varied makes a
    line of its own.

    Args:
        directory: A sweep's directory; its `sweep.jsonl` is read.

    Returns:
        The picture's path.

    Raises:
        InputError: if there are no records, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    records, path = read_sweep(directory), Path(directory) / "sweep.png"
    if not records:
        raise InputError(f"{path.with_name('sweep.jsonl')}: holds no record; nothing to draw")
    across = _across(records)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = _lines(records, across)
    for i, (label, points) in enumerate(lines.items()):
        colour, marker = COLOURS[i % len(COLOURS)], "osD^v<>P"[i // len(COLOURS) % 8]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    befores = [record["before"] for record in records]
    axes.axhline(min(befores), color=GREY, linestyle="--", label="before")
    values = {_short(record["varied"][across]): record["varied"][across] for record in records}
    numbers = all(_is_number(value) for value in values.values())
    if numbers and min(values.values()) > 0:
        axes.set_xscale("log", base=2 if across == "lora.r" else 10)
    axes.set_xticks(list(values.values()) if numbers else range(len(values)), list(values))
    axes.minorticks_off()
    axes.set(xlabel=across, ylabel="held-out loss (nats per trained token)",
             title=as_label(Path(directory).name))  # fmt: skip
    axes.legend(frameon=False, fontsize="small")
    save_figure(figure, [axes], path)
    return path


def _across(records: Sequence[Record]) -> str:
    """What the picture has below: the rank, else the first number that was varied."""
    varied = records[0]["varied"]
    numbers = [name for name, value in varied.items() if _is_number(value)]
    return "lora.r" if "lora.r" in varied else next(iter([*numbers, *varied]))


def _lines(records: Sequence[Record], across: str) -> dict[str, list[tuple[Any, float]]]:
    """Points from left to right, for every combination of what else was varied."""
    ticks = list(dict.fromkeys(_short(record["varied"][across]) for record in records))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for record in records:
        rest = {name: x for name, x in record["varied"].items() if name != across}
        label = ", ".join(f"{name.split('.')[-1]} {_short(x)}" for name, x in rest.items())
        value = record["varied"][across]
        at = value if _is_number(value) else ticks.index(_short(value))
        loss = math.nan if record["loss"] is None else record["loss"]
        lines.setdefault(label or "held-out", []).append((at, loss))
    return {label: sorted(points) for label, points in lines.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _loss(record: Record) -> float:
    return math.inf if record["loss"] is None else record["loss"]


def _short(value: Any) -> str:
    """A varied value in a few letters."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
