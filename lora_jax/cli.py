"""The command line: parse, call, print."""

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._arguments import SECTIONS, Parser, parsers
from ._errors import InputError, nearest
from ._interrupt import stops_at_once


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
    parser, commands = parsers()
    keys, others = _config_keys(arguments)
    options, rest = parser.parse_known_args(others)
    run = COMMANDS[" ".join(filter(None, (options.command, options.action)))]
    run(options, _overrides(commands[options.command], [*rest, *keys], options.sections))


def _config_keys(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--section.key value` words, wherever they stand, and all others."""
    keys, others = [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--resume" and words[:1] not in (["auto"], ["always"]):
            word = "--resume=always"  # argparse would take the config that follows for its value
        if not re.match(r"--\w+\.\w", word):
            others.append(word)
            continue
        keys.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            keys.append(words.pop(0))
    return keys, others


def _overrides(command: Parser, rest: list[str], sections: Sequence[str]) -> list[str]:
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
            likely = difflib.get_close_matches(section, SECTIONS, n=1) or _sections_with(key)
            if likely:
                known = f" (did you mean '--{likely[0]}{dot}{key}'?)"
            raise InputError(f"{command.prog}: unknown flag {word}{known}")
        if not word.startswith("--") and word == rest[0]:
            raise InputError(f"{command.prog}: {word!r} is one word too many")
    return rest


def _sections_with(key: str) -> list[str]:
    """The sections of a config that have this key."""
    from ._config import LoraConfig
    from ._quant_config import QuantConfig
    from .train import DataSection, MeshSection, ModelSection, TrainSection

    sections = {"train": TrainSection, "lora": LoraConfig, "data": DataSection,
                "model": ModelSection, "mesh": MeshSection, "quant": QuantConfig}  # fmt: skip
    name = key.partition("=")[0].replace("-", "_")
    return [own for own, cls in sections.items() if name in cls.__dataclass_fields__]


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
    nothing = (
        "stopped before the first step, so nothing is saved yet; the same command starts again"
    )
    if options.distributed:
        _train_together(options, overrides)
        return
    with stops_at_once(nothing):
        result = _trained(options, _run_config(options, overrides))
    if result is not None:
        _finish(result)


def _train_together(options: argparse.Namespace, overrides: list[str]) -> None:
    """As one of several processes, which take signals after the same step."""
    from .train import join_hosts, once, resume_command

    with join_hosts() as watch:
        config = _run_config(options, overrides)
        watch.begin(config.train.heartbeat, resume_command(Path(config.output)))
        result = _trained(options, config)
        if result is not None:
            once(lambda: _finish(result))


def _run_config(options: argparse.Namespace, overrides: list[str]) -> Any:
    from .train import load_config

    return load_config(options.config, _with_output(options, overrides))


def _trained(options: argparse.Namespace, config: Any) -> Any:
    """The result of a run; None if there is nothing to train."""
    from ._terminal import TrainingProgress, describe_job
    from .train import is_finished, is_first, once, prepare, run

    job, console = prepare(config), _console()
    console.quiet, say = not is_first(), _say(console)
    if options.dry_run:
        say(describe_job(job))
        return None
    if options.resume == "auto" and once(lambda: is_finished(job.config)):
        directory = Path(job.config.output)
        once(lambda: (directory / "report.md").exists() or _report(directory))
        say(f"{directory}: this run is finished; there is nothing left to do")
        return None
    for note in job.notes:
        say(f"note: {note}")
    resume = "auto" if options.resume == "auto" else options.resume is not None
    with TrainingProgress(console) as progress:
        return run(job, resume=resume, listener=progress)


def _finish(result: Any) -> None:
    """Write the report of a run, and say where it is."""
    _report(result.directory)
    _say(_console())(
        f"held-out loss {result.before.loss:.4f} before, {result.after.loss:.4f} after"
        f"{' (stopped early, best kept)' if result.stopped_early else ''}; {result.directory}"
    )


def _report(directory: Path) -> None:
    from .report import write_report
    from .train import several_hosts

    # Several end together, so one of them does not stop by itself.
    unless = (
        contextlib.nullcontext()
        if several_hosts()
        else stops_at_once(f"{directory}: this run is finished, but for its report")
    )
    with unless:
        write_report(directory)


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._terminal import SweepProgress
    from .report import draw_sweep, sweep_table
    from .train import grid, sweep

    members, console = grid(options.config, _with_output(options, overrides)), _console()
    directory = Path(members[0].config.output)
    with SweepProgress(console, len(members)) as progress:
        records = sweep(
            members, at_once=options.at_once, tell=progress.finished, listener=progress.step
        )
    picture = draw_sweep(directory)
    _say(console)(f"\n{sweep_table(records)}\n\n{picture}; the best is in {directory / 'best'}")


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from . import plan as planning

    o = options
    if o.sweep is not None:
        plans = planning.sweep(o.config, o.target, overrides, o.sweep, _tell_plan)
        text, plain = planning.show_grid(plans), [plan.to_json() for plan in plans]
    else:
        plans = [planning.plan(o.config, o.target, overrides)]
        text, plain = planning.show(plans[0]), plans[0].to_json()
        if not (plans[0].fits or o.no_search):
            # Searching takes a while: what is known is told before it.
            print(text, file=sys.stderr if o.json else sys.stdout, flush=True)
            found = planning.search(o.config, o.target, overrides, plans[0], _tell_plan)
            plain["fits_with"] = None if found is None else found[0]
            plain["fits_plan"] = None if found is None else found[1].to_json()
            text = planning.show_found(found)
    print(json.dumps(plain, indent=1) if o.json else text)
    if o.picture is not None:
        planning.draw(plans, o.picture)


def _tell_plan(plan: Any, words: Sequence[str] = ()) -> None:
    """One line to whoever waits, beside the result and not in it."""
    tokens = f"{plan.run['batch_size']} × {plan.run['max_length']} tokens"
    said = " ".join(words) or tokens
    verdict = "fits" if plan.fits else "does not fit"
    size = f"{'' if plan.compiled else 'over '}{plan.total / 1e9:.2f} GB"
    print(f"{said}: {size}, {verdict}", file=sys.stderr, flush=True)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._evaluations import evaluate

    text, plain = evaluate(options, overrides)
    print(json.dumps(plain, indent=1) if options.json else text)


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._inspect import inspect_quantization
    from ._inspect_adapter import inspect_adapter, is_adapter

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


def _merge(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._commands import merge_directories

    o = options
    print(merge_directories(o.model, o.adapter, o.output, o.dtype, o.quant))


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._speaker import Speaker
    from .data import Message

    speaker = Speaker.load(options.model, options.adapter, options.template)
    ways = _ways(options)

    def answer(prompt: str) -> None:
        ids = speaker.prompt([Message("user", prompt)])
        for piece in speaker.answer(ids, **ways):
            print(piece, end="", flush=True)
        print()

    if options.prompt is not None:
        answer(options.prompt)
        return
    while (prompt := _ask()) is not None:
        try:
            answer(prompt)
        except InputError as error:  # too long a prompt, say: the next one may be better
            print(f"error: {error}", file=sys.stderr)
        options.seed += 1
        ways = _ways(options)


def _chat(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._chat import Chat, converse, named_adapters
    from ._speaker import Speaker

    adapters, ways = named_adapters(options.adapter), _ways(options)
    speaker = Speaker.load(options.model, None, options.template)
    converse(Chat(speaker, adapters, template=options.template, system=options.system, **ways))


def _ways(options: argparse.Namespace) -> dict[str, Any]:
    """How texts are to be drawn and what ends them."""
    import dataclasses

    from .models import SamplingParams

    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    return {
        "sampling": SamplingParams(**{name: getattr(options, name) for name in fields}),
        "max_new_tokens": options.max_new_tokens,
        "cache_dtype": options.cache_dtype,
        "stop": [text.replace("\\n", "\n") for text in options.stop],
    }


def _serve(options: argparse.Namespace, overrides: list[str]) -> None:
    from ._serving import serve_command

    serve_command(options, overrides)


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


COMMANDS: Mapping[str, Callable[[argparse.Namespace, list[str]], None]] = {
    "quickstart": _quickstart,
    "train": _train,
    "sweep": _sweep,
    "plan": _plan,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "merge": _merge,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "data show": _data_show,
    "data make": _data_make,
}
