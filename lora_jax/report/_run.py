"""A run, read back from the files it left."""

import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from .._errors import InputError
from ..adapters import DeltaSpectrum, delta_spectra
from ..train import config_text, load_config
from ._records import read_records, series
from ._shapes import ABOUT, SAMPLE, SUMMARY, fits, parts

Record = dict[str, Any]
_OF_A_STEP = {"loss", "steps", "tokens", "tokens_per_second", "peak_memory_bytes"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run say; whatever a file that is missing would say is empty."""

    directory: Path
    config: dict[str, Any]
    """`config.yaml`, resolved."""
    records: list[Record]
    """`metrics.jsonl`."""
    about: dict[str, Any]
    """`run.json`: rows, counts, norms of the base's kernels, and every start."""
    samples: list[Record]
    """`samples.json`: held-out prompts, answered before and after."""
    no_samples: str | None
    """Why there are none, if the run says so."""
    summary: dict[str, Any]
    """`summary.json`: what a command found out beyond the metrics."""
    spectra: list[DeltaSpectrum]
    """Of `adapter/`, where there is one that has deltas."""

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def finished(self) -> bool:
        return any((self.directory / name).exists() for name in ("adapter", "model"))

    @property
    def steps(self) -> list[Record]:
        """The records of training steps."""
        return [r for r in self.records if r.keys() >= _OF_A_STEP]

    @property
    def looks(self) -> list[Record]:
        """The records of held-out losses."""
        return [r for r in self.records if "eval_loss" in r]

    @property
    def keeps_best(self) -> bool:
        return self.config["train"].get("patience") is not None

    @property
    def kept(self) -> Record | None:
        """The held-out loss of the weights that are kept; None before the first look at them."""
        if self.best is None or self.keeps_best:
            return self.best
        return self.looks[-1]

    @property
    def best(self) -> Record | None:
        """The lowest held-out loss, the one before training aside."""
        trained = [look for look in self.looks if look["step"]]
        return min(trained, key=lambda look: look["eval_loss"], default=None)

    @property
    def speed(self) -> float:
        """Tokens per second at the median: the first records hold compilation too."""
        return statistics.median(r["tokens_per_second"] for r in self.steps)

    @property
    def peak(self) -> int:
        """Bytes of memory at the most."""
        return max(r["peak_memory_bytes"] for r in self.steps)

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which the run went on, the first start aside."""
        return [start["step"] for start in self.about.get("starts", [])[1:]]

    @property
    def data(self) -> dict[str, Any]:
        """Counts of the training rows; empty for a run that did not write them."""
        return self.about.get("data", {}).get("train", {})

    @property
    def masked(self) -> float | None:
        """Share of the tokens that is not trained on."""
        return 1 - self.data["trained_tokens"] / self.data["tokens"] if self.data else None

    @property
    def padding(self) -> float | None:
        """Share of an epoch's batches that is padding."""
        return 1 - self.data["tokens"] / self.data["places"] if self.data else None

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """Norm of each delta over that of the kernel it adds to, where that is known."""
        norms = self.about.get("base_norms", {})
        return {x.module: x.norm / norms[x.module] for x in self.spectra if norms.get(x.module)}

    def line(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of what records hold under a key; what overflowed is left out."""
        return series([r for r in self.records if r.get(key) is not None], key)


def read_run(directory: str | Path) -> Run:
    """Read a run back: one that is finished or not, of this version or one before.

    Args:
        directory: The run's, with `config.yaml` and `metrics.jsonl`.

    Raises:
        InputError: if one of these two is missing or broken, or another file is no JSON. What has
            another shape than a run gives it is passed over.
    """
    directory = Path(directory)
    records = read_records(directory)
    config = yaml.safe_load(config_text(load_config(directory / "config.yaml")))
    about, answered, summary = (
        _read(directory / f"{name}.json") for name in ("run", "samples", "summary")
    )
    answered = parts(answered, {"samples": list, "left_out": str})
    summary = parts(summary, SUMMARY)
    samples = [sample for sample in answered.get("samples", []) if fits(sample, SAMPLE)]
    return Run(
        directory=directory,
        config=config,
        records=records,
        about=parts(about, ABOUT),
        samples=samples or _older(summary),
        no_samples=answered.get("left_out"),
        summary=summary,
        spectra=_spectra(directory / "adapter"),
    )


def _older(summary: dict[str, Any]) -> list[Record]:
    """Samples where a quickstart once kept them."""
    return [{"prompt": sample["input"], **sample} for sample in summary.get("samples", [])]


def _spectra(adapter: Path) -> list[DeltaSpectrum]:
    try:
        return delta_spectra(adapter) if adapter.is_dir() else []
    except InputError:  # of biases or whole modules alone, say: there are no deltas
        return []


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read: {' '.join(str(error).split())}") from None
