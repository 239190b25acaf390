"""Commands for rows: look at them, make them from documents."""

import argparse
from pathlib import Path
from typing import Any

from .._console import new_console
from ._command import Command, Parser


def _data_show_arguments(p: Parser) -> None:
    p.add_argument("source", metavar="FILE", help="rows, or a run's YAML file")
    p.add_argument("--model", metavar="DIR", help="whose tokenizer (default: the bundled base)")
    p.add_argument("--count", type=int, default=3, metavar="N", help="rows to show")


def _data_show(options: argparse.Namespace, overrides: list[str]) -> None:
    from ..data import show_data, show_data_rich
    from ..train import load_config, run_config

    if options.source.endswith((".yaml", ".yml")):
        config = load_config(options.source, overrides)
    else:
        raw: dict[str, Any] = {"data": {"train": options.source}, "output": "runs/show"}
        if options.model:
            raw["model"] = {"path": options.model}
        config = run_config(raw, overrides, "data show")
    rows, examples, tokenizer = _rows_and_examples(config)
    console = new_console()
    show = show_data_rich if console.is_terminal else show_data
    shown = show(rows, examples, tokenizer, count=options.count)
    console.print(shown, markup=False, highlight=False)


def _rows_and_examples(config: Any) -> tuple[Any, Any, Any]:
    """The rows of `data.train`, their tokens, and the tokenizer; no weights are read."""
    from ..train import examples_of, load_tokenizer, training_rows, with_length

    rows, pretrained = training_rows(config.data), load_tokenizer(config.model)
    data = with_length(config.data, pretrained)
    return rows, examples_of(rows, data, pretrained), pretrained.tokenizer


def _data_make_arguments(p: Parser) -> None:
    p.add_argument("directory", metavar="DIR")
    p.add_argument("--output", metavar="DIR", help="where to write (default DIR-rows)")
    p.add_argument("--held-out", type=float, default=0.1, metavar="SHARE")
    p.add_argument("--seed", type=int, default=0, metavar="N")


def _data_make(options: argparse.Namespace, overrides: list[str]) -> None:
    from ..data import make_rows

    directory = Path(options.directory)
    output = options.output
    if output is None:
        output = f"{directory.resolve()}-rows"
    card = make_rows(directory, output, held_out=options.held_out, seed=options.seed)
    print(card.markdown())


DATA = {
    "data show": Command(
        "Show how rows become tokens: what is trained on, what is masked, what was dropped.",
        (
            "./lora data show train.jsonl --model DIR --count 5",
            "./lora data show stdlib --data.template chatml",
            "./lora data show configs/quickstart.yaml",
        ),
        _data_show_arguments,
        _data_show,
        ("model", "data"),
    ),
    "data make": Command(
        "Turn text, Markdown and CSV files below a directory into instruction rows.",
        (
            "./lora data make documents",
            "./lora data make documents --output rows --held-out 0.1",
        ),
        _data_make_arguments,
        _data_make,
    ),
}
