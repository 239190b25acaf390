"""One picture for each workload: every case's figure, and the ratios beside their targets."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey.
OURS, THEIRS, TARGET = "#0072B2", "#E69F00", "#D55E00"
ABSOLUTE = ("tokens_per_s", "terabytes_per_s")
SCALES = {"wall": (1.0, "s"), "peak_step": (2.0**-20, "MiB"), "total_s": (1.0, "s")}
NAMES = {
    "wall": "wall time of a step",
    "peak_step": "peak memory in a step",
    "total_s": "tracing and compiling",
    "tokens_per_s": "tokens per second",
    "carries": "bytes per layer over bytes of a carry",
}


def draw(result: dict[str, Any], file: Path) -> None:
    """Medians as dots, quartiles as lines; ratios to the right of them."""
    cases = [c for c in result["cases"].values() if result["shown"] in c["figures"]]
    rows = [row for row in result["rows"] if row["figures"] is not None]
    # Speeds stand in the left half already, and would flatten the ratios.
    rows = [row for row in rows if row["over"] is not None or row["metric"] not in ABSOLUTE]
    height = 1.4 + 0.34 * max(len(cases), len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), layout="constrained")
    scale, unit = SCALES.get(result["shown"], (1.0, ""))
    for i, case in enumerate(cases):
        colour = OURS if case["label"].startswith("lora_jax") else THEIRS
        interval(left, i, case["figures"][result["shown"]], scale, colour)
    name = NAMES.get(result["shown"], str(result["shown"]))
    label(left, [case["label"] for case in cases], f"{name} ({unit})" if unit else name)
    for i, row in enumerate(rows):
        interval(right, i, row["figures"], 1.0, OURS)
        if row["target"]:
            bound = float(row["target"].split()[1])
            right.plot([bound, bound], [i - 0.35, i + 0.35], color=TARGET, linewidth=2)
    label(right, [row["text"] for row in rows], "ratio within rounds; bar: target")
    note = "" if result["quiet"] else "   MACHINE NOT QUIET"
    note += "   TRIAL AT TINY SHAPES" if result["small"] else ""
    figure.suptitle(f"{result['title']} ({result['date']}){note}", fontsize=11)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def interval(axes: Any, at: int, figures: dict[str, float], scale: float, colour: str) -> None:
    ends = [figures["q1"] * scale, figures["q3"] * scale]
    axes.plot(ends, [at, at], color=colour, linewidth=3, solid_capstyle="butt")
    axes.plot(figures["median"] * scale, at, "o", color=colour)
    axes.annotate(
        f"{figures['median'] * scale:,.4g}",
        (figures["median"] * scale, at),
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=7,
        ha="center",
    )


def label(axes: Any, names: list[str], below: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
