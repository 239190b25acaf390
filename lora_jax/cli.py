"""The command line: parse, call, print."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from ._config import QuantFormat
from ._errors import InputError, nearest

SECTIONS = ("model", "quant", "lora", "data", "train", "output")
"""What `--section.key value` may name; see `configs/` for all keys."""


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest word, and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            raise InputError(
                f"{self.prog}: unknown {action.metavar or action.dest} {value!r}"
                f"{nearest(str(value), known)}; known: {', '.join(known)}"
            )

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; wrong input gives one line on stderr and exit code 2."""
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    parser, commands = _parsers()
    keys, others = _config_keys(arguments)
    options, rest = parser.parse_known_args(others)
    options.run(options, _overrides(commands[options.command], [*rest, *keys], options.sections))


def _config_keys(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--section.key value` words, wherever they stand, and all others."""
    keys, others = [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w+\.\w", word):
            others.append(word)
            continue
        keys.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            keys.append(words.pop(0))
    return keys, others


def _overrides(command: _Parser, rest: list[str], sections: Sequence[str]) -> list[str]:
    """The words that set config keys; anything else is a mistake to name."""
    for word in rest:
        section = word[2:].split(".")[0].split("=")[0]
        taken = section in sections or word[2:].split("=")[0] in sections
        if word.startswith("--") and section in SECTIONS and not taken:
            names = [f"--{s}" if "." in s else f"--{s}.key" for s in sections]
            there = f"only {', '.join(names)}" if names else "none"
            raise InputError(
                f"{command.prog}: takes no {word}{nearest(word, command.flags())}: of the"
                f" config's keys, {there}"
            )
        if word.startswith("--") and section not in SECTIONS:
            section, dot, key = word[2:].partition(".")
            known = nearest(word, command.flags())
            if likely := difflib.get_close_matches(section, SECTIONS, n=1):
                known = f" (did you mean '--{likely[0]}{dot}{key}'?)"
            raise InputError(f"{command.prog}: unknown flag {word}{known}")
        if not word.startswith("--") and word == rest[0]:
            raise InputError(f"{command.prog}: {word!r} is one word too many")
    return rest


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="lora",
        description="Fine-tune a model with a low-rank adapter, and use it.",
        epilog="examples:\n"
        "  ./lora quickstart\n"
        "  ./lora train configs/quickstart.yaml --train.steps 100 --output runs/longer\n"
        "  ./lora generate --model DIR --adapter DIR --prompt 'Once upon a time'\n"
        "  ./lora test        runs the tests (./lora test --all: the slow ones too)\n",
    )
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, _Parser] = {}

    def add(name: str, run: Any, text: str, examples: str, sections: Sequence[str] = ()) -> _Parser:
        commands[name] = sub.add_parser(
            name, help=text, description=text, epilog=f"examples:\n{examples}"
        )
        commands[name].set_defaults(run=run, sections=sections)
        return commands[name]

    p = add(
        "quickstart",
        _quickstart,
        "Fine-tune the bundled base on the standard library's docstrings, and show the effect.",
        "  ./lora quickstart\n  ./lora quickstart --train.steps 20 --output runs/short\n",
        SECTIONS,
    )
    p.add_argument("--output", metavar="DIR", help="where to write (default runs/quickstart)")

    p = add(
        "train",
        _train,
        "Train the run that a YAML file describes; --section.key VALUE changes any of its keys.",
        "  ./lora train configs/quickstart.yaml --dry-run\n"
        "  ./lora train configs/gsm8k.yaml --data.train train.jsonl --data.eval test.jsonl\n"
        "  ./lora train configs/quickstart.yaml --lora.r 8 --output runs/rank8\n"
        "  ./lora train runs/rank8/config.yaml --resume\n",
        SECTIONS,
    )
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument("--output", metavar="DIR", help="where to write; must not hold a run")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="everything but the steps: resolved config, matched modules, counts, bytes",
    )

    p = add(
        "evaluate",
        _evaluate,
        "Measure the loss of a model, with or without an adapter, on rows of data.",
        "  ./lora evaluate --model DIR --adapter DIR --data test.jsonl\n"
        "  ./lora evaluate --model DIR --data test.jsonl --data.template chatml"
        " --quant.format nf4\n",
        ("model", "quant", "data", "train.loss_chunk"),
    )
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--adapter", metavar="DIR")
    p.add_argument("--data", required=True, metavar="FILE", help="rows, or stdlib-heldout")
    p.add_argument("--batch-size", type=int, default=8, metavar="N")

    p = add(
        "inspect",
        _inspect,
        "Show what quantization does to a model: every layer's error, and the held-out loss.",
        "  ./lora inspect DIR --quant --data test.jsonl\n"
        "  ./lora inspect bundled --quant --data stdlib-heldout --data.train_rows 40\n",
        ("data", "train.loss_chunk", "train.batch_size"),
    )
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--quant", action="store_true", required=True, help="compare the formats")
    p.add_argument("--data", metavar="FILE", help="held-out rows, or stdlib-heldout")
    p.add_argument("--formats", metavar="A,B", help="only these, such as nf4,int4-zero")

    p = add(
        "merge",
        _merge,
        "Merge an adapter into its base and write a model in Hugging Face layout.",
        "  ./lora merge --model DIR --adapter DIR --output DIR\n"
        "  ./lora merge --model DIR --adapter DIR --output DIR --quant nf4\n",
    )
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--adapter", required=True, metavar="DIR")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument(
        "--quant",
        choices=get_args(QuantFormat),
        help="merge into the base as this format holds it, which is what QLoRA trained on",
    )

    p = add(
        "generate",
        _generate,
        "Continue a prompt; without --prompt, talk to the model until an empty line.",
        "  ./lora generate --model DIR --prompt 'Once upon a time' --template plain\n"
        "  ./lora generate --model DIR --adapter DIR --temperature 0.7 --seed 1\n",
    )
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--adapter", metavar="DIR")
    p.add_argument("--prompt", metavar="TEXT")
    p.add_argument(
        "--template",
        metavar="NAME",
        help="how the prompt is laid out: plain, alpaca, chatml, tokenizer"
        " (default: what the adapter was trained with, else the tokenizer's, else plain)",
    )
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is all")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P")
    p.add_argument("--seed", type=int, default=0, metavar="N")

    data = add(
        "data",
        None,
        "Look at rows as the model will see them, or make rows from documents.",
        "  ./lora data show train.jsonl --model DIR\n  ./lora data make DIR --output rows\n",
    )
    data_sub = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add_data(name: str, run: Any, text: str, examples: str, sections: Sequence[str]) -> _Parser:
        made = data_sub.add_parser(name, help=text, description=text, epilog=examples)
        made.set_defaults(run=run, sections=sections)
        return made

    p = add_data(
        "show",
        _data_show,
        "Show how rows become tokens: what is trained on, what is masked, what was dropped.",
        "examples:\n  ./lora data show train.jsonl --model DIR --count 5\n"
        "  ./lora data show stdlib --data.template chatml\n"
        "  ./lora data show configs/quickstart.yaml\n",
        ("model", "data"),
    )
    p.add_argument("source", metavar="FILE", help="rows, or a run's YAML file")
    p.add_argument("--model", metavar="DIR", help="whose tokenizer (default: the bundled base)")
    p.add_argument("--count", type=int, default=3, metavar="N", help="rows to show")
    p = add_data(
        "make",
        _data_make,
        "Turn text, Markdown and CSV files below a directory into instruction rows.",
        "examples:\n  ./lora data make documents\n"
        "  ./lora data make documents --output rows --held-out 0.1\n",
        (),
    )
    p.add_argument("directory", metavar="DIR")
    p.add_argument("--output", metavar="DIR", help="where to write (default DIR-rows)")
    p.add_argument("--held-out", type=float, default=0.1, metavar="SHARE")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    return parser, commands


def _quickstart(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._quickstart import quickstart
    from ._terminal import TrainingProgress
    from .train import load_config

    config = load_config(_config_path("quickstart.yaml"), _with_output(options, overrides))
    console = _console()
    with TrainingProgress(console) as progress:
        directory = quickstart(config, _say(console), progress)
    _say(console)(f"\nEverything is in {directory}; begin with {directory / 'report.md'}")


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._terminal import TrainingProgress, describe_job
    from .report import draw_loss, write_report
    from .train import load_config, prepare, run

    config = load_config(options.config, _with_output(options, overrides))
    console = _console()
    job = prepare(config)
    if options.dry_run:
        console.print(describe_job(job), markup=False, highlight=False)
        return
    with TrainingProgress(console) as progress:
        result = run(job, resume=options.resume, listener=progress)
    draw_loss(result.directory)
    write_report(result.directory)
    _say(console)(
        f"held-out loss {result.before.loss:.4f} before, {result.after.loss:.4f} after"
        f"{' (stopped early, best kept)' if result.stopped_early else ''}; {result.directory}"
    )


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._commands import evaluate_rows

    raw = {
        "model": {"path": options.model},
        "data": {"train": options.data},
        "train": {"batch_size": options.batch_size},
        "output": "runs/evaluate",
    }
    result = evaluate_rows(raw, overrides, options.adapter)
    print(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f},"
        f" {result.tokens:,} trained tokens"
    )


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._inspect import inspect_quantization

    o = options
    for line in inspect_quantization(o.model, o.formats, o.data, overrides):
        print(line, flush=True)


def _merge(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._commands import merge_directories

    o = options
    print(merge_directories(o.model, o.adapter, o.output, o.dtype, o.quant))


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._commands import Speaker

    speaker = Speaker.load(options.model, options.adapter, options.template)
    sampling = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    if options.prompt is not None:
        print(speaker.answer(options.prompt, **sampling))
        return
    while (prompt := _ask()) is not None:
        try:
            print(speaker.answer(prompt, **sampling))
        except InputError as error:  # too long a prompt, say: the next one may be better
            print(f"error: {error}", file=sys.stderr)
        sampling["seed"] += 1


def _data_show(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._commands import rows_and_examples
    from .data import show_data, show_data_rich
    from .train import load_config, run_config

    if options.source.endswith((".yaml", ".yml")):
        config = load_config(options.source, overrides)
    else:
        raw: dict[str, Any] = {"data": {"train": options.source}, "output": "runs/show"}
        if options.model:
            raw["model"] = {"path": options.model}
        config = run_config(raw, overrides, "data show")
    rows, examples, tokenizer = rows_and_examples(config)
    console = _console()
    show = show_data_rich if console.is_terminal else show_data
    shown = show(rows, examples, tokenizer, count=options.count)
    console.print(shown, markup=False, highlight=False)


def _data_make(options: argparse.Namespace, overrides: list[str]) -> None:
    from .data import make_rows

    directory = Path(options.directory)
    output = options.output
    if output is None:
        output = f"{directory.resolve()}-rows"
    card = make_rows(directory, output, held_out=options.held_out, seed=options.seed)
    print(card.markdown())


def _with_output(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    given = [] if options.output is None else ["--output", options.output]
    return [*overrides, *given]


def _config_path(name: str) -> Path:
    """A config of the repository, or of the installed package."""
    here = Path(__file__).parent
    candidates = [here.parent / "configs" / name, here / "configs" / name]
    return next((path for path in candidates if path.exists()), candidates[0])


def _ask() -> str | None:
    """A line from the person, or None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "") or None
    except EOFError:
        return None


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # Lines stay whole in a file or a pipe, and break between words on a terminal.
    console.soft_wrap = not console.is_terminal
    return console


def _say(console: Any) -> Any:
    return lambda text: console.print(text, markup=False, highlight=False)
