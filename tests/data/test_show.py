"""What `data show` prints."""

import io
import json

import pytest
from rich.console import Console

from lora_jax.data import build_examples, read_rows, show_data, show_data_rich, show_example


@pytest.fixture
def shown(tmp_path, tokenizer):
    raw = [
        {"instruction": "Say [bold]hello[/bold].", "output": "Hello\n\nworld", "id": 1},
        {"instruction": "x" * 400, "output": "y", "id": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    rows = read_rows(tmp_path / "rows.jsonl")
    return rows, build_examples(rows, tokenizer, max_length=150), tokenizer


def test_marks_enclose_exactly_what_is_trained(shown) -> None:
    _, examples, tokenizer = shown
    text = show_example(examples[0], tokenizer)
    assert text.endswith("### Response:\n⟦Hello\n\nworld</s>⟧")
    whole = tokenizer.decode(examples[0].input_ids, special=True)
    assert text.replace("⟦", "").replace("⟧", "") == whole


def test_plain_text_counts_everything(shown) -> None:
    text = show_data(*shown)
    report = shown[1].report
    for line in (
        "format     alpaca (instruction, output)",
        "template   alpaca",
        "rows       2, giving 1 sequences",
        f"tokens     {report.tokens:,}, of which {report.trained_tokens:,} are trained on",
        "dropped    1 rows",
        "1: answer beyond max_length",
        "note       columns not used: id",
        f"rows.jsonl:1: {report.tokens} tokens, {report.trained_tokens} trained on",
    ):
        assert line in text


def test_colours_and_no_markup_of_the_data(shown) -> None:
    colour = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    colour.print(show_data_rich(*shown))
    text = colour.file.getvalue()
    assert "\x1b[1;32mHello" in text
    assert "[bold]hello[/bold]" in text
