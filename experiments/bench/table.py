"""The README's table, made from the JSON of the results: no figure is typed by hand.

python experiments/bench/table.py [--check]
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stats import Samples, met, ratio, spread
from workloads import GPU_READ_ROWS, GPU_TRAIN_ROWS, WORKLOADS, Row

HERE = Path(__file__).resolve().parent
HEAD = "| workload | target (stretch) | measured | spread | met? |\n|---|---|---|---|---|"
BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
_NOT_YET = "not yet measured"


def of_result(result: dict[str, Any]) -> str:
    """One result's rows under the table's head."""
    return "\n".join([HEAD, *(line(row, result) for row in result["rows"])])


def line(row: dict[str, Any], result: dict[str, Any]) -> str:
    """A row: median, quartiles, number of rounds.

    >>> figures = {"median": 0.71234, "q1": 0.7, "q3": 0.72, "min": 0.69, "n": 24}
    >>> row = {"text": "a over b", "target": "<= 0.75", "stretch": "0.70", "figures": figures,
    ...        "cpu": figures, "met": "yes", "of": "a", "over": "b"}
    >>> line(row, {"quiet": True, "left_out": {}})
    '| a over b | <= 0.75 (0.70) | 0.712 | 0.700 .. 0.720, n 24; CPU time 0.712 | yes |'
    >>> line(row | {"figures": None}, {"quiet": True, "left_out": {"b": "b: ImportError: no b"}})
    '| a over b | <= 0.75 (0.70) | left out: b: ImportError: no b |  |  |'
    """
    stretch = f" ({row['stretch']})" if row["stretch"] else ""
    begin = f"| {row['text']} | {row['target'] or ''}{stretch} |"
    figures = row["figures"]
    if figures is None:
        left_out = result["left_out"]
        reason = left_out.get(row["of"]) or left_out.get(row["over"]) or "case is missing"
        return f"{begin} left out: {reason.replace('|', '/')} |  |  |"
    quiet = "" if result["quiet"] else ", machine not quiet"
    spread = f"{number(figures['q1'])} .. {number(figures['q3'])}, n {figures['n']}"
    if figures["n"] == 1:
        spread = "one value"
    cpu = f"; CPU time {number(row['cpu']['median'])}" if row.get("cpu") else ""
    return f"{begin} {number(figures['median'])} | {spread}{cpu}{quiet} | {row['met']} |"


def number(value: float) -> str:
    """Three digits after the point, or whole thousands with commas.

    >>> number(0.71234), number(13042.3)
    ('0.712', '13,042')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def row_of(row: Row, samples: Samples) -> dict[str, Any]:
    """A row of the table with its figures; without them where a case is missing."""
    known = {"text": row.text, "of": row.of, "over": row.over, "metric": row.metric}
    known |= {"target": row.target, "stretch": row.stretch}
    if row.of not in samples or (row.over is not None and row.over not in samples):
        return known | {"figures": None}
    figures = quotient(row, row.metric, samples)
    more = {"cpu": quotient(row, "cpu", samples)} if row.metric == "wall" else {}
    return known | {"figures": figures, **more, "met": met(figures["median"], row.target)}


def quotient(row: Row, metric: str, samples: Samples) -> dict[str, float]:
    of = samples[row.of][metric]
    return spread(of) if row.over is None else ratio(of, samples[row.over][metric])


def expected(rows: Iterable[Row]) -> dict[str, Any]:
    """What stands in the table before a workload has been measured."""
    blank = {"figures": None, "met": ""}
    return {
        "rows": [dataclasses.asdict(row) | blank for row in rows],
        "quiet": True,
        "left_out": {},
    }


def whole(results: Path) -> str:
    """All rows, from the samples, and below them where and when they were measured."""
    lines, footer = [HEAD], []
    rows = {name: w.rows for name, w in WORKLOADS.items()}
    rows |= {"gpu_train": GPU_TRAIN_ROWS, "gpu_read": GPU_READ_ROWS}
    for name, own in rows.items():
        file = results / f"{name}.json"
        if not file.is_file():
            blank = expected(own)["rows"]
            lines += [line(row, {"left_out": {row["of"]: _NOT_YET}}).replace("left out: ", "")
                      for row in blank]  # fmt: skip
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        samples = {key: case["samples"] for key, case in result["cases"].items()}
        lines += [line(row_of(row, samples), result) for row in own]
        footer.append(f"- `{name}`: {conditions(result)}")
    return "\n".join([*lines, "", *footer]).rstrip() + "\n"


def conditions(result: dict[str, Any]) -> str:
    """Hardware, versions, date, load."""
    hardware, versions = result["hardware"], result["versions"]
    known = ", ".join(
        f"{package} {versions[package]}"
        for package in ("jax", "qwix", "torch", "peft", "transformers", "bitsandbytes")
        if package in versions
    )
    where = hardware.get("accelerator") or f"{result['threads']} cores of {hardware['processor']}"
    load = f"load average {result['load']['load_average']} before"
    others = result["notes"].get("others")
    busy = "" if others is None else f", others used {100 * others:.1f} % meanwhile"
    quiet = "" if result["quiet"] else " (not quiet)"
    commit = f", commit {result['commit']}" if result["commit"] else ""
    return f"{result['date']}, {where}; {known}; {load}{busy}{quiet}{commit}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the README's table from results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it differs")
    options = parser.parse_args()
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda found: found[1] + whole(HERE / "results") + found[2], text)
    if options.check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
