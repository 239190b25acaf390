"""Commands that measure a model and show what an adapter learned."""

import argparse
import json
from collections.abc import Sequence

from .._errors import InputError
from ._command import Command, Parser


def _evaluate_arguments(p: Parser) -> None:
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's directory: on its held-out rows")
    p.add_argument("--model", metavar="DIR")
    p.add_argument("--adapter", metavar="DIR", help="compared with the model alone")
    p.add_argument("--data", metavar="FILE", help="rows, or stdlib-heldout; they are not packed")
    p.add_argument(
        "--exact-match",
        metavar="FILE.jsonl",
        help="generate the answers of rows whose answers are numbers, as in GSM8K (columns question"
        " and answer, or by --data.columns); what was cut short goes on",
    )
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default 256)")
    p.add_argument("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas")
    p.add_argument("--include-path", metavar="DIR", help="where tasks of your own for it stand")
    p.add_argument("--limit", type=int, metavar="N", help="rows of each of its tasks at most")
    p.add_argument("--shots", type=int, metavar="N", help="examples before each of its questions")
    p.add_argument(
        "--chat", action="store_true", default=None, help="its questions in the chat template"
    )
    p.add_argument("--batch-size", type=int, metavar="N", help="default 8, or the run's")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._evaluations import evaluate

    text, plain = evaluate(options, overrides)
    print(json.dumps(plain, indent=1) if options.json else text)


def _inspect_arguments(p: Parser) -> None:
    p.add_argument("directory", metavar="DIR", help="an adapter's, or with --quant a model's")
    p.add_argument("--model", metavar="DIR", help="of an adapter's base: compare norms with it")
    p.add_argument("--picture", metavar="FILE", help="draw an adapter's ranks into a PNG file")
    p.add_argument("--quant", action="store_true", help="compare the formats of a model")
    p.add_argument("--data", metavar="FILE", help="held-out rows, or stdlib-heldout")
    p.add_argument("--formats", metavar="A,B", help="only these, such as nf4,int4-zero")


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._inspect import inspect_quantization
    from .._inspect_adapter import inspect_adapter, is_adapter

    o = options
    if is_adapter(o.directory):
        _only("inspect an adapter", o, ("quant", "data", "formats"), overrides)
        lines = iter(inspect_adapter(o.directory, o.model, o.picture))
    elif not o.quant:
        raise InputError(f"{o.directory}: holds no adapter_config.json; of a model, --quant tells")
    else:
        _only("inspect --quant", o, ("model", "picture"), [])
        lines = inspect_quantization(o.directory, o.formats, o.data, overrides)
    for line in lines:
        print(line, flush=True)


def _only(what: str, options: argparse.Namespace, others: Sequence[str], keys: list[str]) -> None:
    """Refuse options that would change nothing."""
    given = [f"--{name}" for name in others if getattr(options, name)] + keys[:1]
    if given:
        raise InputError(f"lora {what}: takes no {given[0]}; leave it out")


LOOKING = {
    "evaluate": Command(
        "Measure the loss of a model with and without what was trained, its answers, or a task.",
        (
            "./lora evaluate runs/mine",
            "./lora evaluate --model DIR --adapter DIR --data test.jsonl --json",
            "./lora evaluate --model DIR --data test.jsonl --data.template chatml"
            " --quant.format nf4",
            "./lora evaluate --model DIR --data test.jsonl --exact-match answers.jsonl",
            "./lora evaluate --model DIR --adapter DIR --harness gsm8k,arc_easy --limit 100",
        ),
        _evaluate_arguments,
        _evaluate,
        ("model", "quant", "data", "train.loss_chunk"),
    ),
    "inspect": Command(
        "Show what an adapter learned and the rank it needs, or what quantization does to a model.",
        (
            "./lora inspect runs/mine/adapter --model DIR",
            "./lora inspect DIR --quant --data test.jsonl",
            "./lora inspect bundled --quant --data stdlib-heldout --data.train_rows 40",
        ),
        _inspect_arguments,
        _inspect,
        ("data", "train.loss_chunk", "train.batch_size"),
    ),
}
