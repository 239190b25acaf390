"""Token ids, masks, truncation, and what is counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_jax._errors import InputError
from lora_jax._tokenizer import Tokenizer
from lora_jax.data import Example, build_examples, read_rows

ANSWERS = ["Hello, world!", "= 4", "sat on\n\nthe mat 🌍"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path):
    raw = [{"instruction": "Say it.", "output": answer} for answer in ANSWERS]
    return read_rows(write(tmp_path / "rows.jsonl", raw))


@pytest.fixture
def turns(tmp_path: Path):
    messages = [
        {"role": role, "content": content}
        for pair in (("Hi", "one"), ("And", "two"))
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    return read_rows(write(tmp_path / "turns.jsonl", [{"messages": messages}]))


def trained_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.loss_mask], special=True)


@pytest.mark.parametrize("template", ["alpaca", "chatml", "plain"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_the_answer_and_its_end_are_trained(make_tokenizer, rows, template, add_bos) -> None:
    tokenizer = make_tokenizer(add_bos_token=add_bos)
    end = "<|im_end|>" if template == "chatml" else "</s>"
    examples = build_examples(rows, tokenizer, template=template)
    assert [trained_text(e, tokenizer) for e in examples] == [a + end for a in ANSWERS]
    assert [e.row for e in examples] == [0, 1, 2]
    assert all((e.input_ids[0] == tokenizer.bos_id) is np.bool_(add_bos) for e in examples)
    assert examples.report.trained_tokens == sum(int(e.loss_mask.sum()) for e in examples)
    assert not examples.report.notes


def test_last_and_all(tokenizer, turns) -> None:
    def text(train_on):
        return trained_text(build_examples(turns, tokenizer, train_on=train_on)[0], tokenizer)

    assert text("answer") == "one</s>two</s>"
    assert text("last") == "two</s>"
    [example] = build_examples(turns, tokenizer, train_on="all")
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_a_bos_of_the_template_is_not_doubled(make_tokenizer, turns) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template, add_bos_token=True)
    [example] = build_examples(turns, tokenizer)
    assert example.input_ids.tolist().count(tokenizer.bos_id) == 1


def test_truncation_is_counted_and_never_loses_silently(tokenizer, rows) -> None:
    whole = build_examples(rows, tokenizer)
    prompt = int(np.argmax(whole[0].loss_mask))
    assert all(int(np.argmax(e.loss_mask)) == prompt for e in whole)
    cut = build_examples(rows, tokenizer, max_length=prompt + 3)
    assert [len(e) for e in cut] == [prompt + 3] * 3
    for short, long in zip(cut, whole, strict=True):
        assert short.input_ids.tolist() == long.input_ids[: len(short)].tolist()
    shorter = sum(len(e) > prompt + 3 for e in whole)
    assert (cut.report.truncated, cut.report.dropped) == (shorter, {})


def test_rows_whose_answer_is_cut_away_are_dropped_with_the_reason(tmp_path, tokenizer) -> None:
    raw = [{"instruction": "x" * 500, "output": "y"}, {"instruction": "x", "output": "y"}]
    rows = read_rows(write(tmp_path / "rows.jsonl", raw))
    examples = build_examples(rows, tokenizer, max_length=200)
    assert [e.row for e in examples] == [1]
    assert examples.report.dropped == {"answer beyond max_length": 1}
    assert (examples.report.rows, examples.report.truncated) == (2, 0)


def test_no_trained_token_at_all(tokenizer, rows, tmp_path) -> None:
    with pytest.raises(InputError, match=r"no token is left to train on .*max_length: 3\)"):
        build_examples(rows, tokenizer, max_length=4)
    muted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "weight": 0}]
    rows = read_rows(write(tmp_path / "muted.jsonl", [{"messages": muted}]))
    with pytest.raises(InputError, match="nothing to train on in it: 1"):
        build_examples(rows, tokenizer)


@pytest.mark.parametrize("add_bos", [True, False])
def test_long_texts_are_split_not_cut(tmp_path, make_tokenizer, add_bos) -> None:
    """Consecutive pieces share a token, so that all but the first token are targets once."""
    text = "the cat sat on the mat, " * 20
    (tmp_path / "a.txt").write_text(text)
    tokenizer, rows = make_tokenizer(add_bos_token=add_bos), read_rows(tmp_path / "a.txt")
    [whole] = build_examples(rows, tokenizer)
    for length in (16, len(whole) - 1):
        examples = build_examples(rows, tokenizer, max_length=length)
        first, *later = [e.input_ids.tolist() for e in examples]
        ids = [*first, *(i for piece in later for i in piece[1:])]
        assert ids == whole.input_ids.tolist()
        assert tokenizer.decode(ids, special=True) == "<s>" * add_bos + text + "</s>"
        assert all(not e.loss_mask[0] and e.loss_mask[1:].all() for e in examples)
        assert max(map(len, examples)) == length
        assert (examples.report.split, examples.report.truncated) == (1, 0)


def test_an_unweighted_last_answer_does_not_train_the_one_before(tokenizer, tmp_path) -> None:
    talk = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "two", "weight": 0},
    ]  # fmt: skip
    rows = read_rows(write(tmp_path / "rows.jsonl", [{"messages": talk}]))
    assert build_examples(rows, tokenizer).report.trained_tokens > 0
    with pytest.raises(InputError, match="nothing to train on in it: 1"):
        build_examples(rows, tokenizer, train_on="last")


def test_the_note_on_turns_that_never_end(make_tokenizer, turns) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    examples = build_examples(turns, make_tokenizer(chat_template=template))
    assert "1 of 1 rows train on no end of turn" in examples.report.notes[0]


def test_histogram_and_counts(tokenizer, rows) -> None:
    report = build_examples(rows, tokenizer).report
    assert sum(count for _, count in report.lengths) == report.examples == 3
    assert all(bound & (bound - 1) == 0 for bound, _ in report.lengths)


def test_bad_options(tokenizer, rows) -> None:
    with pytest.raises(InputError, match="did you mean 'answer'"):
        build_examples(rows, tokenizer, train_on="answers")
    with pytest.raises(InputError, match="max_length must be at least 2"):
        build_examples(rows, tokenizer, max_length=1)


def test_gsm8k_with_a_real_tokenizer(data_dir) -> None:
    tokenizer = Tokenizer.from_directory(data_dir / "stories260K-hf")
    columns = {"instruction": "question", "output": "answer"}
    rows = read_rows(data_dir / "gsm8k" / "test.jsonl", columns=columns, limit=200)
    examples = build_examples(rows, tokenizer)
    assert examples.template == "alpaca"
    for example in examples:
        question, answer = (m.content for m in rows.rows[example.row].messages)
        assert trained_text(example, tokenizer) == f"{answer}</s>"
        masked = tokenizer.decode(example.input_ids[~example.loss_mask])
        assert masked.endswith(f"### Instruction:\n{question}\n\n### Response:\n")


def test_chinese_rows(data_dir, tokenizer) -> None:
    rows = read_rows(data_dir / "alpaca_demo" / "alpaca_zh_demo.json", limit=50)
    for example in build_examples(rows, tokenizer):
        answer = rows.rows[example.row].messages[-1].content
        assert trained_text(example, tokenizer) == f"{answer}</s>"
