"""What was measured, as Markdown."""

import json
import statistics
from pathlib import Path
from typing import Any

CLEAR = 0.02
"""Loss that rounding must cost for a share of it to mean anything."""


def of(path: Path) -> str:
    """Markdown: medians over the seeds, with their range."""
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in map(json.loads, lines_of(path)):
        by.setdefault((record["format"], record["how"]), []).append(record)
    bare_of = {format: found[0] for (format, how), found in by.items() if how == "bare"}
    return "\n\n".join([losses(by, bare_of), likeness(bare_of), merges(by)])


def losses(by: dict[Any, Any], bare_of: dict[str, Any]) -> str:
    """Every start of every base; what is left of the loss that rounding cost."""
    floor = bare_of["float32"]["heldout"]
    tuned_floor = _median(by.get(("float32", "lora"), []), "heldout")
    rows = []
    for (format, how), found in by.items():
        before = bare_of[format]["heldout"]
        cost, after = before - floor, _median(found, "heldout")
        shown = how in ("lora", "loftq", "pissa") and cost > CLEAR
        rows.append([
            format,
            f"{bare_of[format].get('bits', 32):.2f}",
            how,
            _cell(found, "error") or _cell(found, "rms"),
            _cell(found, "start") or f"{before:.4f}",
            "" if how == "bare" else _cell(found, "heldout"),
            _cell(found, "train"),
            _cell(found, "gap"),
            f"{(after - tuned_floor) / cost:+.2f}" if shown else "",
        ])  # fmt: skip
    head = "base,bits,start,weight error,loss before,after,on training rows,gap,rounding cost left"
    return _markdown(head, rows)


def likeness(bare_of: dict[str, Any]) -> str:
    """Whether tokens that are close stay so."""
    rows = []
    for format, x in bare_of.items():
        e = x.get("embedding", {"neighbour": 1.0, "equal_rows": 0, "equal_before": 0})
        equal = e["equal_rows"] - e["equal_before"]
        shares = (x["top1"], x["neighbour"], e["neighbour"])
        rows.append([format, *(f"{share:.3f}" for share in shares), str(equal)])
    return _markdown(
        "base,same likeliest token,same nearest state,same nearest embedding,rows now equal",
        rows,
    )


def merges(by: dict[Any, Any]) -> str:
    """The cost of merging."""
    rows = [
        [format, *(_cell(by[format, "lora"], x) for x in ("heldout", "merged", "requantized"))]
        for format, how in by
        if how == "lora"
    ]
    return _markdown("base,adapter apart,merged into dense,quantized again", rows)


def _markdown(head: str, rows: list[list[str]]) -> str:
    columns = head.split(",")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(records: list[dict[str, Any]], name: str) -> list[float]:
    if name == "gap":
        return [x["heldout"] - x["train"] for x in records if "train" in x]
    return [x[name] for x in records if name in x]


def _median(records: list[dict[str, Any]], name: str) -> float:
    values = _values(records, name)
    return statistics.median(values) if values else float("nan")


def _cell(records: list[dict[str, Any]], name: str) -> str:
    values = _values(records, name)
    if not values:
        return ""
    spread = (
        f" ({min(values):.4f} to {max(values):.4f})"
        if len(values) > 1 and min(values) < max(values)
        else ""
    )
    return f"{statistics.median(values):.4f}{spread}"


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
