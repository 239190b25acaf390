"""Answers that are numbers: generated, read, and compared with the right ones."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from .._errors import InputError
from ..data import Row, Rows, choose_template, encode_prompt, stop_ids
from ._model import TextModel, continue_texts
from ._numbers import flexible_number, strict_number
from ._records import add_records, close_records, open_records

UNTIL = ("Question:", "### Instruction:", "<|im_start|>")
"""What a model writes that goes on to a question of its own."""

READERS: Mapping[str, Callable[[str], Decimal | None]] = {
    "strict": strict_number,
    "flexible": flexible_number,
}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`correct` rows of `rows`.

    Example:
        >>> accuracy = Accuracy(3, 4)
        >>> accuracy.share, accuracy.standard_error
        (0.75, 0.25)
    """

    correct: int
    rows: int

    @property
    def share(self) -> float:
        """correct / rows."""
        return self.correct / self.rows

    @property
    def standard_error(self) -> float | None:
        """√(p (1 - p) / (rows - 1)), as lm-evaluation-harness has it; None of a single row."""
        if self.rows < 2:
            return None
        return math.sqrt(self.share * (1 - self.share) / (self.rows - 1))


def answer_rows(
    model: TextModel,
    rows: Rows,
    output: Path,
    *,
    template: str = "auto",
    max_new_tokens: int = 256,
    batch_size: int = 8,
    until: Sequence[str] = UNTIL,
    settings: Mapping[str, Any] | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Accuracy]:
    """Answer every row greedily and count the right numbers.

    A row's prompt is that of training: all turns before its last answer, in the template.  Each
    answer is kept as soon as its batch is done; if the work is cut short, the same call goes on.

    Args:
        model: One that generates.
        rows: Their last answers hold the right numbers, after `####` as in GSM8K or as the last.
        output: File for a JSON record of each row: `row`, `where`, `prompt`, `answer`,
            `generated`, `expected`, and by reading (`strict`, `flexible`) `extracted` and
            `correct`.
        template: As in `build_examples`.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Rows answered at a time.
        until: Texts that end an answer.
        settings: What else the answers depend on; work that is gone on with must have the same.
        tell: Called with how many rows are done, of how many.

    Returns:
        `strict` and `flexible`: the accuracy by `strict_number` and by `flexible_number`.

    Raises:
        InputError: if a row has no question or no number, a prompt does not fit, or `output`
            exists.
    """
    template = choose_template(template, rows, model.tokenizer)
    expected = [_expected(row) for row in rows]
    prompts = [_prompt(row, template, model, max_new_tokens) for row in rows]
    options = {"template": template, "max_new_tokens": max_new_tokens, "until": list(until)}
    header = {"rows": len(rows), "source": rows.source, **options, **(settings or {})}
    done = {record["row"]: record for record in open_records(output, header)}
    left = [n for n, row in enumerate(rows) if row.index not in done]
    batches = continue_texts(
        model,
        [prompts[n] for n in left],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        until=until,
        eos_ids=stop_ids(template, model.tokenizer),
    )
    tell(len(done), len(rows))
    for texts in batches:
        chosen = {left[i]: text for i, text in texts.items()}
        shown = {n: model.tokenizer.decode(prompts[n], special=True) for n in chosen}
        records = [_record(rows.rows[n], shown[n], chosen[n], expected[n]) for n in chosen]
        add_records(output, header, records)
        done |= {record["row"]: record for record in records}
        tell(len(done), len(rows))
    records = [done[row.index] for row in rows]
    close_records(output, records)
    return {
        name: Accuracy(sum(record["correct"][name] for record in records), len(records))
        for name in READERS
    }


def _record(row: Row, prompt: str, generated: str, expected: Decimal) -> dict[str, Any]:
    found = {name: read(generated) for name, read in READERS.items()}
    return {
        "row": row.index,
        "where": row.where,
        "prompt": prompt,
        "answer": row.messages[-1].content,
        "generated": generated,
        "expected": str(expected),
        "extracted": {name: None if n is None else str(n) for name, n in found.items()},
        "correct": {name: n == expected for name, n in found.items()},
    }


def _expected(row: Row) -> Decimal:
    if not row.messages or row.messages[-1].role != "assistant":
        raise InputError(f"{row.where}: no question with an answer; give rows of both")
    answer = row.messages[-1].content
    strict = strict_number(answer)
    number = flexible_number(answer) if strict is None else strict
    if number is None:
        raise InputError(f"{row.where}: no number in the answer {answer[:40]!r}; end it in #### 42")
    return number


def _prompt(row: Row, template: str, model: TextModel, max_new_tokens: int) -> list[int]:
    ids = encode_prompt(row.messages[:-1], template, model.tokenizer)
    limit = model.scorer.max_length
    if len(ids) + max_new_tokens > limit:
        raise InputError(
            f"{row.where}: a prompt of {len(ids)} tokens, which with {max_new_tokens} new ones"
            f" exceeds the model's {limit} positions; lower --max-new-tokens, or leave the row out"
        )
    return ids
