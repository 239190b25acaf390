"""Commands that train, or say what training would take."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._console import new_console, writer
from .._interrupt import stops_at_once
from .._program import PROGRAM
from ._command import SECTIONS, Command, Parser


def _quickstart_arguments(p: Parser) -> None:
    p.add_argument("--output", metavar="DIR", help="where to write (default runs/quickstart)")


def _quickstart(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._quickstart import quickstart
    from .._terminal import TrainingProgress
    from ..train import load_config

    config = load_config(_config_path("quickstart.yaml"), _with_output(options, overrides))
    console = new_console()
    with TrainingProgress(console) as progress:
        directory = quickstart(config, writer(console), progress)
    writer(console)(f"\nEverything is in {directory}; begin with {directory / 'report.md'}")


def _config_path(name: str) -> Path:
    """A config of the repository, or of the installed package."""
    package = Path(__file__).parents[1]
    candidates = [package.parent / "configs" / name, package / "configs" / name]
    return next((path for path in candidates if path.exists()), candidates[0])


def _train_arguments(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", help="the run; configs/ has some to begin with")
    p.add_argument("--output", metavar="DIR", help="where to write; must not hold a run")
    p.add_argument(
        "--resume",
        nargs="?",
        choices=("always", "auto"),
        const="always",
        help="go on from the newest whole checkpoint; auto: begin if there is no run yet, and do"
        " nothing if it is finished, so that one command line serves every restart",
    )
    p.add_argument(
        "--distributed",
        action="store_true",
        help="train together with the processes that are started with the same command: by Slurm,"
        " Cloud TPU, Kubernetes or Open MPI, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"
        " and JAX_PROCESS_ID",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="everything but the steps: resolved config, matched modules, counts, bytes",
    )


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    nothing = (
        "stopped before the first step, so nothing is saved yet; the same command starts again"
        if options.resume is None
        else "stopped before the first step from there; the same command goes on"
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
    from ..train import join_hosts, once, resume_command

    with join_hosts() as watch:
        config = _run_config(options, overrides)
        watch.begin(config.train.heartbeat, resume_command(Path(config.output)))
        result = _trained(options, config)
        if result is not None:
            once(lambda: _finish(result))


def _run_config(options: argparse.Namespace, overrides: list[str]) -> Any:
    from ..train import load_config

    return load_config(options.config, _with_output(options, overrides))


def _trained(options: argparse.Namespace, config: Any) -> Any:
    """The result of a run; None if there is nothing to train."""
    from .._terminal import TrainingProgress, describe_job
    from ..train import is_finished, is_first, once, prepare, run

    job, console = prepare(config), new_console()
    console.quiet, say = not is_first(), writer(console)
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
    """Write the report of a run, say where it is, and what stands out in it."""
    lines, say = _report(result.directory), writer(new_console())
    say(
        f"held-out loss {result.before.loss:.4f} before, {result.after.loss:.4f} after"
        f"{' (stopped early, best kept)' if result.stopped_early else ''}; {result.directory}"
    )
    for line in lines:
        say(f"advice: {line}")


def _report(directory: Path) -> list[str]:
    """Write the report of a run; gives its advice."""
    from ..report import advice, read_run, write_report
    from ..train import several_hosts

    # Several end together, so one of them does not stop by itself.
    unless = (
        contextlib.nullcontext()
        if several_hosts()
        else stops_at_once(f"{directory}: this run is finished, but for its report")
    )
    with unless:
        found = read_run(directory)
        write_report(found)
        return advice(found)


def _sweep_arguments(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", help="what all runs of the grid have in common")
    p.add_argument("--output", metavar="DIR", help="where to write; must be empty")
    p.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="adapters in one step (default 8)"
    )


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._terminal import SweepProgress
    from ..report import draw_sweep, sweep_table
    from ..train import grid, sweep

    members, console = grid(options.config, _with_output(options, overrides)), new_console()
    directory = Path(members[0].config.output)
    with SweepProgress(console, len(members)) as progress:
        records = sweep(
            members, at_once=options.at_once, tell=progress.finished, listener=progress.step
        )
    picture = draw_sweep(directory)
    writer(console)(f"\n{sweep_table(records)}\n\n{picture}; the best is in {directory / 'best'}")


def _with_output(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    given = [] if options.output is None else ["--output", options.output]
    return [*overrides, *given]


def _plan_arguments(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", help="the run whose step is compiled")
    p.add_argument(
        "--target",
        default="cpu",
        metavar="NAME",
        help="cpu (default), h200, h100, a100-80, a100-40, rtx4090, h200x8 and so on, or a slice"
        " of TPUs: v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:2x2",
    )
    p.add_argument("--sweep", metavar="AXES", help="batch,seq: memory against both")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    p.add_argument("--picture", metavar="FILE", help="draw it into a PNG file too")
    p.add_argument("--no-search", action="store_true", help="do not look for a change that fits")


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from .. import plan as planning

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


TRAINING = {
    "quickstart": Command(
        "Fine-tune the bundled base on the standard library's docstrings, and show the effect.",
        (
            "./lora quickstart",
            "./lora quickstart --train.steps 20 --output runs/short",
        ),
        _quickstart_arguments,
        _quickstart,
        SECTIONS,
        stopped=f"stopped; {PROGRAM} alone shows what is saved and how to go on",
    ),
    "train": Command(
        "Train the run that a YAML file describes; --section.key VALUE changes any of its keys.",
        (
            "./lora train configs/quickstart.yaml --dry-run",
            "./lora train configs/gsm8k.yaml --data.train train.jsonl --data.eval test.jsonl",
            "./lora train configs/quickstart.yaml --lora.r 8 --output runs/rank8",
            "./lora train runs/rank8/config.yaml --resume",
            "./lora train configs/gsm8k.yaml --resume auto --output runs/gsm8k",
            "./lora train CONFIG.yaml --distributed --resume auto  # on every host",
        ),
        _train_arguments,
        _train,
        SECTIONS,
        stopped=None,
    ),
    "sweep": Command(
        "Train a grid of adapters over one base, several in one step, and keep the best.",
        (
            "./lora sweep configs/quickstart.yaml --lora.r 1,2,4,8,16,32",
            "./lora sweep CONFIG.yaml --lora.r 4,16 --train.learning_rate 1e-3,3e-3 --output DIR",
            "./lora sweep CONFIG.yaml --lora.target_modules '[q_proj,v_proj],all-linear'",
        ),
        _sweep_arguments,
        _sweep,
        SECTIONS,
    ),
    "plan": Command(
        "Compile a run's train step for a machine that need not be here, and show what it takes.",
        (
            "./lora plan configs/quickstart.yaml",
            "./lora plan configs/llama3_8b_qlora.yaml --target rtx4090",
            "./lora plan configs/llama3_8b_qlora.yaml --target v5e:1x1 --sweep batch,seq",
            "./lora plan configs/llama3_70b_qlora.yaml --target v5e:4x4 --mesh.fsdp 16",
        ),
        _plan_arguments,
        _plan,
        ("model", "quant", "lora", "data", "train", "mesh"),
    ),
}
