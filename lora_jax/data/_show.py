"""What training sees: decoded rows with what is trained on, and what became of the others."""

from typing import Any

from .._tokenizer import Tokenizer
from ._examples import Example, Examples
from ._rows import Rows

_OPEN, _CLOSE = "⟦", "⟧"
_BAR = 30


def trained_spans(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example in stretches that are trained on, or are not.

    Args:
        example: Token ids and mask.
        tokenizer: What decodes them; marks such as `</s>` are shown.
    """
    mask, ids = example.loss_mask, example.input_ids
    edges = [n for n in range(1, len(ids)) if mask[n] != mask[n - 1]]
    spans, done = [], ""
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        # From the beginning each time: some decoders treat the first token specially.
        text = tokenizer.decode(ids[:end], special=True)
        piece = text[len(done) :] if text.startswith(done) else tokenizer.decode(ids[start:end])
        spans.append((piece, bool(mask[start])))
        done = text
    return spans


def show_example(example: Example, tokenizer: Tokenizer) -> str:
    """An example as text, with what is trained on between ⟦ and ⟧.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models
        >>> from lora_jax.data import Message, Row, tokenize
        >>> backend = Backend(models.WordLevel({"Ready?": 0, "yes": 1}, unk_token="yes"))
        >>> backend.add_special_tokens(["</s>"])
        1
        >>> tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=2)
        >>> row = Row((Message("user", "Ready?"), Message("assistant", "yes")), "", 0, "here")
        >>> show_example(tokenize(row, tokenizer, template="plain"), tokenizer)
        'Ready?⟦ yes </s>⟧'
    """
    return "".join(
        f"{_OPEN}{text}{_CLOSE}" if trained else text
        for text, trained in trained_spans(example, tokenizer)
    )


def show_example_rich(example: Example, tokenizer: Tokenizer) -> Any:
    """An example as a `rich.text.Text`: what is trained on is green, the rest is grey."""
    from rich.text import Text

    result = Text()
    for text, trained in trained_spans(example, tokenizer):
        result.append(text, style="bold green" if trained else "grey50")
    return result


def show_report(rows: Rows, examples: Examples) -> str:
    """Counts of rows, tokens, truncations, and what was dropped and why."""
    report = examples.report
    columns = ", ".join(
        our if our == column else f"{our}={column}" for our, column in rows.columns.items()
    )
    share = 100 * report.trained_tokens / report.tokens
    lines = [
        f"source     {rows.source}",
        f"format     {rows.format} ({columns})",
        f"template   {examples.template}",
        f"rows       {report.rows:,}, giving {report.examples:,} sequences",
        f"tokens     {report.tokens:,}, of which {report.trained_tokens:,} are trained on"
        f" ({share:.0f} %)",
        f"truncated  {report.truncated:,} rows cut off, {report.split:,} texts split",
        f"dropped    {sum(report.dropped.values()):,} rows",
        *(f"           {count:,}: {reason}" for reason, count in report.dropped.items()),
        "lengths    " + "\n           ".join(_histogram(report.lengths)),
        *(f"note       {note}" for note in report.notes),
    ]
    return "\n".join(lines)


def show_data(rows: Rows, examples: Examples, tokenizer: Tokenizer, *, count: int = 3) -> str:
    """The report and the first examples, as plain text."""
    parts = [show_report(rows, examples), f"{_OPEN}…{_CLOSE} is trained on"]
    for example in examples.examples[:count]:
        parts.append(f"--- {_title(example, rows)}\n{show_example(example, tokenizer)}")
    return "\n\n".join(parts)


def show_data_rich(rows: Rows, examples: Examples, tokenizer: Tokenizer, *, count: int = 3) -> Any:
    """The report and the first examples, as a `rich` group of panels for a terminal."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    legend = Text.assemble(("trained on", "bold green"), "  ", ("masked", "grey50"))
    panels = [
        Panel(
            show_example_rich(example, tokenizer),
            title=Text(_title(example, rows)),
            title_align="left",
        )
        for example in examples.examples[:count]
    ]
    return Group(Text(show_report(rows, examples)), legend, *panels)


def _title(example: Example, rows: Rows) -> str:
    trained = int(example.loss_mask.sum())
    where = rows.rows[example.row].where
    return f"{where}: {len(example)} tokens, {trained} trained on"


def _histogram(lengths: tuple[tuple[int, int], ...]) -> list[str]:
    most = max(count for _, count in lengths)
    return [
        f"up to {bound:>6,}  {'█' * max(1, round(_BAR * count / most))} {count:,}"
        for bound, count in lengths
    ]
