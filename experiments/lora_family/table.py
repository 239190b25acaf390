"""The README's tables, made from what the scripts have written: no figure is typed by hand.

python experiments/lora_family/table.py
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    readme = HERE / "README.md"
    text = "\n\n".join([steps(), together(), variants()])
    whole = BLOCK.sub(lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text("utf-8"))
    readme.write_text(whole, encoding="utf-8")


def steps() -> str:
    lines = ["| DoRA's step over LoRA's | goal | measured | quartiles |", "|---|---|---|---|"]
    for row in _read("dora_cpu.json")["rows"]:
        lines.append(f"| 2 cores, {row['base']}, 1,024 tokens | ≤ 1.15 | {_figures(row)} |")
    return "\n".join(lines)


def together() -> str:
    head = "| eight adapters in one step over eight steps | tokens of each | goal | measured |"
    lines = [f"{head} quartiles |", "|---|---|---|---|---|"]
    for device, name in (("cpu", "2 cores"), ("gpu", "NVIDIA H200")):
        for row in _read(f"together_{device}.json")["rows"]:
            goal = "≤ 0.4" if device == "cpu" and row["tokens"] == 16 else ""
            lines.append(f"| {name}, {row['base']} | {row['tokens']} | {goal} | {_figures(row)} |")
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3f} | {row['q1']:.3f} .. {row['q3']:.3f}, n {row['rounds']}"


def variants() -> str:
    """Each variant at its better learning rate; the spread is over seeds."""
    path = HERE / "variants.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [
        "| variant | held-out loss | over seeds | better rate | trainable |",
        "|---|---|---|---|---|",
    ]
    found = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        by_rate = {
            rate: [row["loss"] for row in own if row["rate"] == rate]
            for rate in dict.fromkeys(row["rate"] for row in own)
        }
        whole = {rate: x for rate, x in by_rate.items() if None not in x}
        rate = min(whole, key=lambda rate: statistics.mean(whole[rate]))
        trainable = statistics.median_high(row["trainable"] for row in own)
        found.append((statistics.mean(whole[rate]), name, whole[rate], rate, trainable))
    for mean, name, losses, rate, trainable in sorted(found):
        spread = f"{min(losses):.3f} .. {max(losses):.3f}"
        lines.append(f"| {name} | {mean:.3f} | {spread} | {rate:g} | {trainable:,} |")
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text("utf-8"))


if __name__ == "__main__":
    main()
