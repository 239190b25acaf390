"""What the report of a run says."""

import dataclasses
import shlex
from typing import Any

from .._config import LoraConfig
from ._advice import advice
from ._blocks import (
    Block,
    Code,
    Folded,
    Lines,
    Marked,
    Page,
    Picture,
    Section,
    Table,
    Text,
    percent,
)
from ._figures import plot_lengths, plot_progress, plot_run_loss, smoothing_width
from ._run import Run
from ._spectra import plot_spectra, spectra_by_kind, spectra_table, spectra_words


def run_page(run: Run) -> Page:
    """The report of a run, of whatever its files tell."""
    told = advice(run)
    return Page(
        run.name,
        lead=[*_outcome(run), *_loss(run)],
        sections=[
            Section("What to change", [Lines(told)] if told else []),
            Section("What was trained", [_trained(run)]),
            Section("The rows", _rows(run)),
            Section("The course of the training", _course(run)),
            Section("What the adapter has learned", _learned(run)),
            Section("Merged", _merged(run)),
            Section("The same prompts before and after", _samples(run)),
            Section("To repeat it", _repeat(run)),
        ],
    )


def _outcome(run: Run) -> list[Block]:
    rows = []
    if run.kept is not None:
        losses = run.looks[0]["eval_loss"], run.kept["eval_loss"]
        rows.append(("held-out loss (nats per token)", *losses))
    if "fair" in run.summary:
        fair = run.summary["fair"]
        rows.append(("held-out loss, fairly scored", fair["before"], fair["after"]))
    cells = [(name, f"{a:.4f}", f"{b:.4f}", percent(b / a - 1, "+.1f")) for name, a, b in rows]
    table: list[Block] = [Table(("", "before", "after", "change"), cells)] if cells else []
    return [*table, Text(" ".join(_words(run)))]


def _words(run: Run) -> list[str]:
    """How the run went, in sentences."""
    words = []
    ended = run.about.get("ended", {})
    if run.steps:
        last = run.steps[-1]
        whole = "" if last["step"] == last["steps"] else f" of {last['steps']:,}"
        words.append(
            f"{last['step']:,}{whole} steps, {last['tokens']:,} tokens, last training loss"
            f" {last['loss']:.4f}, {run.speed:,.0f} tokens/s, peak memory {run.peak / 1e9:.2f} GB."
        )
    if not run.finished:
        words.append("The run has not left its result yet.")
    if ended.get("early"):
        patience = run.config["train"]["patience"]
        words.append(f"It stopped early, after {patience} looks without a better held-out loss.")
    if run.keeps_best and run.kept is not None:
        words.append(f"The weights of step {run.kept['step']:,} were the best, and are kept.")
    if run.resumed_at:
        words.append(f"It went on from step {', '.join(f'{s:,}' for s in run.resumed_at)}.")
    return words


def _loss(run: Run) -> list[Block]:
    if not (run.steps or run.looks):
        return []
    width, every = smoothing_width(len(run.steps)), run.config["train"].get("log_every", 1)
    of = "one step" if every == 1 else f"the mean of up to {every} steps"
    caption = f"A point of the training loss is {of}."
    if width:
        caption += f" Smoothed: the mean around it, weighted by a Gaussian of σ = {width} points."
    alt = f"Training and held-out loss over the steps: {_in_words(run)}"
    return [Picture(plot_run_loss(run), "loss.png", alt, caption)]


def _in_words(run: Run) -> str:
    """What the picture of the losses shows."""
    named = {"training": run.line("loss")[1], "held out": run.line("eval_loss")[1]}
    return ", ".join(f"{k} from {v[0]:.3f} to {v[-1]:.3f}" for k, v in named.items() if v)


def _trained(run: Run) -> Table:
    return Table(("", ""), [*_weights(run), *_training(run.config["data"], run.config["train"])])


def _weights(run: Run) -> list[tuple[str, str]]:
    c, counts = run.config, run.about.get("counts")
    rows = [("base", f"{c['model']['path']} ({c['model'].get('dtype', 'float32')})")]
    if c.get("quant"):
        double = ", absmax quantized again" if c["quant"].get("double_quant") else ""
        rows.append(("frozen weights", f"{c['quant']['format']}{double}"))
    if c["train"]["method"] == "lora":
        rows += _adapter(c["lora"], run.about.get("targets", []))
    else:
        rows.append(("trained", "all weights"))
    if counts:
        share = counts["trainable"] / (counts["trainable"] + counts["frozen"])
        rows.append(("trainable", f"{counts['trainable']:,} parameters ({percent(share, '.2f')})"))
        if counts["frozen"]:
            size = counts["frozen_bytes"] / 1e6
            rows.append(("frozen", f"{counts['frozen']:,} parameters in {size:,.1f} MB"))
    return rows


def _training(data: dict[str, Any], train: dict[str, Any]) -> list[tuple[str, str]]:
    length = f"{train['steps']:,} steps" if train.get("steps") else f"{train['epochs']:g} epochs"
    times = f" × {train['accumulate']}" if train.get("accumulate", 1) > 1 else ""
    up_to = f" of up to {data['max_length']:,} tokens" if data.get("max_length") else ""
    rate = f"learning rate {train['learning_rate']:g}, {train['schedule']}"
    return [
        ("rows", _files(data["train"])),
        ("held-out rows", _files(data["eval"]) if data.get("eval") else "set aside from these"),
        ("length", f"{length} of {train['batch_size']}{times} rows{up_to}"),
        ("optimizer", f"{train['optimizer']}, {rate}"),
        ("seed", str(train["seed"])),
    ]


def _adapter(lora: dict[str, Any], targets: list[str]) -> list[tuple[str, str]]:
    modules = lora["target_modules"] or lora.get("target_parameters")
    modules = ", ".join(modules) if isinstance(modules, list) else str(modules)
    number = f" ({len(targets)} modules)" if targets else ""
    rows = [("adapter", f"rank {lora['r']}, alpha {lora['lora_alpha']:g}, on {modules}{number}")]
    shown = ("r", "lora_alpha", "target_modules", "task_type")
    usual = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    others = {k: v for k, v in lora.items() if k not in shown and v and v != usual.get(k)}
    if others:
        rows.append(("its other settings", ", ".join(f"{k}: {v}" for k, v in others.items())))
    return rows


def _rows(run: Run) -> list[Block]:
    told = run.about.get("data")
    if told is None:
        return []
    train = told["train"]
    shares = (
        f"{percent(run.masked or 0)} of the tokens are masked, {percent(run.padding or 0)} of the"
        f" batches is padding; template {train['template']}, trained on:"
        f" {run.config['data']['train_on']}."
    )
    alt = "Sequences by length: " + ", ".join(
        f"{count:,} of up to {bound:,} tokens" for bound, count in train["lengths"]
    )
    return [
        _counts(train, told["eval"]),
        Text(shares),
        *([Lines(train["notes"])] if train["notes"] else []),
        Picture(plot_lengths(train["lengths"]), "lengths.png", alt),
        *(
            Marked(f"{row['where']}, {row['tokens']:,} tokens, trained on what is marked:",
                   [(text, mark) for text, mark in row["spans"]])
            for row in told["rows"]
        ),
    ]  # fmt: skip


def _counts(train: dict[str, Any], held_out: dict[str, Any]) -> Table:
    """What became of the rows to train on, and of those to measure on."""
    named = {
        "rows": "rows",
        "sequences": "examples",
        "tokens": "tokens",
        "trained tokens": "trained_tokens",
        "truncated rows": "truncated",
    }
    counts = {name: (train[key], held_out[key]) for name, key in named.items()}
    for reason in dict.fromkeys([*train["dropped"], *held_out["dropped"]]):
        lost = (part["dropped"].get(reason, 0) for part in (train, held_out))
        counts[f"dropped: {reason}"] = tuple(lost)
    rows = [(name, *(f"{n:,}" for n in numbers)) for name, numbers in counts.items()]
    return Table(("", "training", "held out"), rows)


def _files(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _course(run: Run) -> list[Block]:
    if not run.steps:
        return []
    rates, norms = run.line("learning_rate")[1], run.line("grad_norm")[1]
    speeds = run.line("tokens_per_second")[1]
    rate, norm = max(rates, default=0), max(norms, default=0)
    alt = (
        f"Over the steps: the learning rate, up to {rate:.2g}; the gradient's norm, up to"
        f" {norm:.3g}; tokens per second, up to {max(speeds):,.0f}; peak memory"
    )
    clip = run.config["train"].get("clip_norm")
    caption = f"Dashed: the norm that gradients are clipped to ({clip:g})." if clip else ""
    return [Picture(plot_progress(run), "progress.png", alt, caption)]


def _learned(run: Run) -> list[Block]:
    if not run.spectra:
        return []
    rows = [
        (kind, str(number), "/".join(map(str, ranks)), f"{effective:.1f}", f"{needed:g}",
         "" if share is None else percent(share, ".2f"))
        for kind, number, ranks, effective, needed, share in spectra_by_kind(
            run.spectra, run.shares
        )
    ]  # fmt: skip
    head = ("", "modules", "r", "effective rank", "needed rank", "norm of kernel's")
    alt = "Norm and effective rank of the deltas, by kind of module over the layers: " + "; ".join(
        f"{kind} of rank {effective}" for kind, _, _, effective, _, _ in rows
    )
    return [
        Picture(plot_spectra(run.spectra, run.shares), "deltas.png", alt),
        Table(head, rows),
        Text("Medians over the modules of a kind. The effective rank is the exponential of the"
             " singular values' entropy; the needed rank keeps 99 % of the squared norm."),
        Lines(spectra_words(run.spectra)),
        Folded("Every module", Code("\n".join(spectra_table(run.spectra, run.shares)))),
    ]  # fmt: skip


def _merged(run: Run) -> list[Block]:
    merge = run.summary.get("merge")
    if merge is None:
        return []
    return [
        Text(
            f"The model in merged/, read back, differs from base and adapter by"
            f" {merge['largest_difference']:.1e} of the largest logit"
            f" ({merge['largest_logit']:.1f}) over {merge['tokens']:,} held-out tokens."
        )
    ]


def _samples(run: Run) -> list[Block]:
    if run.no_samples:
        return [Text(f"Left out: {run.no_samples}.")]
    blocks: list[Block] = []
    for sample in run.samples:
        answers = ("before", "after", "expected")
        lines = [f"{name}: {sample[name].strip() or '(nothing)'}" for name in answers]
        blocks += [Code(sample["prompt"].strip()), Lines(lines)]
    return blocks


def _repeat(run: Run) -> list[Block]:
    config = shlex.quote((run.directory / "config.yaml").as_posix())
    blocks: list[Block] = [Code(f"./lora train {config} --output DIR")]
    starts = run.about.get("starts", [])
    for start in starts:
        machine = start["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in start["versions"].items() if v)
        from_step = f" from step {start['step']:,}" if start["step"] else ""
        memory = machine["device_bytes"]
        each = f" of {memory / 1e9:.0f} GB" if memory else ""
        processes = f", {machine['processes']} processes" if machine["processes"] > 1 else ""
        rows = [
            ("started", f"{start['time']}{from_step}"),
            ("as", start["command"]),
            ("on", f"{machine['devices']}{each}{processes}; {machine['processor']},"
                   f" {machine['cores']} cores, {machine['system']}"),
            ("with", versions),
        ]  # fmt: skip
        blocks.append(Table(("", ""), rows))
    if "ended" in run.about:
        blocks.append(Text(f"Ended {run.about['ended']['time']}."))
    return blocks
