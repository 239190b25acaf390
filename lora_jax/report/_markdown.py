"""`report.md`: a run in words, from the files it left."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from .._errors import InputError
from .._files import atomic_file
from ._records import read_records

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def write_report(directory: str | Path) -> Path:
    """Write `report.md` from the run's `config.yaml`, `metrics.jsonl` and `summary.json`.

    `summary.json` is optional: what a command found out beyond the metrics (counts, a merge
    check, samples before and after).

    Args:
        directory: A run's directory.

    Returns:
        The report's path.

    Raises:
        InputError: if the run's files are missing or cannot be read.
    """
    directory = Path(directory)
    records = read_records(directory)
    config = _read(directory / "config.yaml", yaml.safe_load)
    summary = {}
    if (directory / "summary.json").exists():
        summary = _read(directory / "summary.json", json.loads)
    parts = [
        f"# {directory.name}",
        _outcome(records, summary, keeps_best=config["train"]["patience"] is not None),
        "![Training and held-out loss over the steps](loss.png)",
        _trained_on(config, summary),
        _checks(summary),
        _samples(summary.get("samples", [])),
        _repeat(config),
    ]
    path = directory / "report.md"
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _outcome(records: list[dict[str, Any]], summary: dict[str, Any], *, keeps_best: bool) -> str:
    looks = [r for r in records if "eval_loss" in r]
    if keeps_best:
        looks = [*looks[:1], min(looks, key=lambda look: look["eval_loss"])] if looks else []
    steps = [r for r in records if "loss" in r]
    rows = [("held-out loss", looks[0]["eval_loss"], looks[-1]["eval_loss"])] if looks else []
    if "fair" in summary:
        fair = summary["fair"]
        rows.append(("held-out loss, fairly scored", fair["before"], fair["after"]))
    lines = ["| nats per token | before | after | change |", "|---|---|---|---|"]
    for name, before, after in rows:
        lines.append(
            f"| {name} | {before:.4f} | {after:.4f} | {100 * (after / before - 1):+.1f} % |"
        )
    if keeps_best and looks:
        lines += ["", f"The weights of step {looks[-1]['step']} were the best, and are kept."]
    if steps:
        last = steps[-1]
        lines += [
            "",
            f"{last['step']} steps, {last['tokens']:,} tokens, last training loss"
            f" {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s,"
            f" peak memory {last['peak_memory_bytes'] / 1e9:.2f} GB.",
        ]
    return "\n".join(lines)


def _trained_on(config: dict[str, Any], summary: dict[str, Any]) -> str:
    data, lora = config["data"], config["lora"]
    lines = ["## What was trained on what", "", f"- base: `{config['model']['path']}`"]
    if config.get("quant"):
        double = ", absmax quantized again" if config["quant"]["double_quant"] else ""
        lines.append(f"- frozen weights: {config['quant']['format']}{double}")
    if config["train"]["method"] == "lora":
        lines.append(
            f"- adapter: rank {lora['r']}, alpha {lora['lora_alpha']}, on {lora['target_modules']}"
        )
    lines.append(f"- rows: `{data['train']}`, measured on `{data['eval'] or 'rows set aside'}`")
    lines += [f"- {name}: {value}" for name, value in summary.get("counts", {}).items()]
    return "\n".join(lines)


def _checks(summary: dict[str, Any]) -> str:
    if "merge" not in summary:
        return ""
    merge = summary["merge"]
    return (
        "## Merged\n\n"
        f"The model in `merged/`, read back, differs from base and adapter by"
        f" {merge['largest_difference']:.1e} of the largest logit ({merge['largest_logit']:.1f})"
        f" over {merge['tokens']:,} held-out tokens."
    )


def _samples(samples: list[dict[str, str]]) -> str:
    if not samples:
        return ""
    parts = ["## The same prompts before and after"]
    for sample in samples:
        parts += [
            f"```python\n{sample['input']}\n```",
            f"- before: {_inline(sample['before'])}\n- after: {_inline(sample['after'])}\n"
            f"- the author's own: {_inline(sample['expected'])}",
        ]
    return "\n\n".join(parts)


def _repeat(config: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return (
        "## To repeat it\n\n"
        f"```sh\n./lora train {Path(config['output']).as_posix()}/config.yaml --output DIR\n```\n\n"
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()};"
        f" {versions}."
    )


def _inline(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`" if text.strip() else "(nothing)"


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot read: {error}") from None
