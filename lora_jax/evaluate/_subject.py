"""What is evaluated: a base, what was trained over it, and held-out rows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._program import PROGRAM
from .._typing import Params
from ..adapters import adapter_notes
from ..data import Rows
from ..models import Pretrained
from ..train import (
    RunConfig,
    examples_of,
    held_out_rows,
    load_base,
    load_config,
    run_config,
    training_rows,
    with_adapter,
    with_length,
    with_tokens_of,
)
from ..transform import lora_linen
from ._loss import RowLosses, row_losses
from ._model import TextModel
from ._score import Scorer


@dataclasses.dataclass(frozen=True)
class Subject:
    """A base, by its config; the directory of what was trained; how to read the rows.

    `trained` holds an adapter, or a whole model if `config.train.method` is `full`.
    """

    config: RunConfig
    trained: str | None
    rows: Callable[[], Rows]

    @classmethod
    def of_run(cls, directory: str | Path, overrides: Sequence[str] = ()) -> "Subject":
        """A finished run, on the rows that it held out.

        Args:
            directory: The run's.
            overrides: `--section.key value` words, laid over its config.

        Raises:
            InputError: if there is no run, or it is not finished.
        """
        file = Path(directory) / "config.yaml"
        if not file.is_file():
            raise InputError(
                f"{directory}: no config.yaml, so no run; give a run's directory, or --model and"
                " --data"
            )
        config = load_config(file, list(overrides))
        trained = Path(directory) / ("model" if config.train.method == "full" else "adapter")
        if not trained.is_dir():
            raise InputError(
                f"{directory}: holds no {trained.name}/ yet; {PROGRAM} train {file} --resume goes"
                " on"
            )
        config = _as_trained(config, str(trained))
        return cls(config, str(trained), functools.partial(held_out_rows, config.data))

    @classmethod
    def of_files(
        cls,
        model: str,
        adapter: str | None = None,
        data: str | None = None,
        overrides: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
    ) -> "Subject":
        """A model's directory, an adapter's, and a file of rows.

        Args:
            model: Hugging Face directory, or `bundled`.
            adapter: PEFT directory.
            data: File of rows, or `stdlib-heldout`.
            overrides: `--section.key value` words.
            columns: Our column names to the file's.
        """
        raw: dict[str, Any] = {
            "model": {"path": model},
            "data": {"train": data or "none", "columns": dict(columns or {})},
            "output": "runs/evaluate",
        }
        config = _as_trained(run_config(raw, list(overrides), "evaluate"), adapter)
        return cls(config, adapter, functools.partial(training_rows, config.data))

    def text_model(self) -> TextModel:
        """The trained model, or the base if there is none."""
        c = self.config
        if self.trained is not None and c.train.method == "full":
            return TextModel.of(self._trained_whole(), chunk=c.train.loss_chunk)
        pretrained = load_base(c.model, c.quant)
        params = with_adapter(pretrained, self.trained)
        return TextModel.of(pretrained, params, chunk=c.train.loss_chunk)

    def losses(self) -> "HeldOutLosses":
        """Losses by row of the base, and of what was trained if there is such.

        Raises:
            InputError: if the rows, the model or the adapter are not what they should be.
        """
        rows = self.rows()  # first, since it fails fast
        pretrained = load_base(self.config.model, self.config.quant)
        measure = measure_on(self.config, rows, pretrained)
        base, trained = measure(pretrained.params), None
        if self.trained is not None and self.config.train.method == "full":
            pretrained = self._trained_whole()
            trained = measure_on(self.config, rows, pretrained)(pretrained.params)
        elif self.trained is not None:
            trained = measure(with_adapter(pretrained, self.trained))
        return HeldOutLosses(base, trained)

    def _trained_whole(self) -> Pretrained:
        assert self.trained is not None
        return load_base(dataclasses.replace(self.config.model, path=self.trained, add_tokens=[]))


@dataclasses.dataclass(frozen=True)
class HeldOutLosses:
    """Losses on the same rows of a base, and of what was trained over it."""

    base: RowLosses
    trained: RowLosses | None = None

    @property
    def difference(self) -> RowLosses | None:
        """trained - base, row by row."""
        return None if self.trained is None else self.trained.minus(self.base)


def measure_on(
    config: RunConfig, rows: Rows, pretrained: Pretrained
) -> Callable[[Params], RowLosses]:
    """A function from parameters of a model to their loss on rows, by a run's settings."""
    data = with_length(config.data, pretrained)
    examples = examples_of(rows, data, pretrained)
    module, chunk = lora_linen(pretrained.module), config.train.loss_chunk
    scorer = Scorer.of_decoder(module, pretrained.config, chunk=chunk)
    return functools.partial(
        row_losses, scorer, examples=examples, batch_size=config.train.batch_size
    )


def _as_trained(config: RunConfig, trained: str | None) -> RunConfig:
    """The template and the tokens that an adapter was trained with, where none are given."""
    if trained is None:
        return config
    if not config.model.add_tokens:
        config = dataclasses.replace(config, model=with_tokens_of(config.model, trained))
    if config.data.template != "auto":
        return config
    template = adapter_notes(trained).get("template", "auto")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template=template))
