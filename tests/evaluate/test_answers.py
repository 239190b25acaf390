"""Answers generated, read and recorded; work cut short goes on with what it had."""

import dataclasses
import json

import pytest

from lora_jax import InputError
from lora_jax.data import Message, Row, Rows, encode_prompt
from lora_jax.evaluate import Accuracy, answer_rows, continue_texts

WRITTEN = {
    "one": "so 1\n#### 1",
    "two": "#### 2.00 dollars</s> three",
    "three": "it is $3.\nQuestion: four? 4",
    "four": "#### 5",
    "five": "no idea",
}
RIGHT = {
    "one": "#### 1",
    "two": "#### 2",
    "three": "#### 3",
    "four": "#### 4",
    "five": "so\n#### 5",
}


@pytest.fixture
def rows():
    talks = [(Message("user", q), Message("assistant", a)) for q, a in RIGHT.items()]
    return Rows(tuple(Row(t, "", i, f"f:{i}") for i, t in enumerate(talks)), "alpaca", "f", {})


@pytest.fixture
def scripted(text_model):
    """A model that writes what is written above, and notes which prompts it was given."""
    tokenizer, asked = text_model.tokenizer, []
    answers = {
        tuple(encode_prompt([Message("user", q)], "alpaca", tokenizer)): tokenizer.encode(a)
        for q, a in WRITTEN.items()
    }

    def generate(params, prompts, *, max_new_tokens, eos_ids, pad_id):
        asked.append([tuple(prompt) for prompt in prompts])
        ended = []
        for prompt in prompts:
            ids = answers[tuple(prompt)][:max_new_tokens]
            end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
            ended.append(ids[: end + 1])
        return ended

    scorer = dataclasses.replace(text_model.scorer, max_length=400)
    return dataclasses.replace(text_model, generate=generate, scorer=scorer), asked


def test_records_and_accuracies(scripted, rows, tmp_path):
    model, asked = scripted
    output, told = tmp_path / "out" / "answers.jsonl", []
    found = answer_rows(model, rows, output, batch_size=2, tell=lambda *now: told.append(now))
    assert found == {"strict": Accuracy(2, 5), "flexible": Accuracy(3, 5)}
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["row"] for r in records] == [0, 1, 2, 3, 4]
    assert [p.name for p in output.parent.iterdir()] == ["answers.jsonl"]
    assert [r["correct"]["strict"] for r in records] == [True, True, False, False, False]
    two, three = records[1], records[2]
    assert two["generated"] == "#### 2.00 dollars" and two["extracted"]["strict"] == "2.00"
    assert two["answer"] == "#### 2" and two["expected"] == "2" and two["where"] == "f:1"
    assert two["prompt"].startswith("Below is") and two["prompt"].endswith("### Response:\n")
    assert three["generated"] == "it is $3.\n" and three["extracted"]["strict"] is None
    assert [len(prompts) for prompts in asked] == [2, 2, 2]  # the last is filled up
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_work_cut_short_goes_on(scripted, rows, tmp_path):
    model, asked = scripted
    output = tmp_path / "answers.jsonl"

    def interrupted(*args, **options):
        if len(asked) == 1:
            raise KeyboardInterrupt
        return model.generate(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        answer_rows(dataclasses.replace(model, generate=interrupted), rows, output, batch_size=2)
    part = tmp_path / ".answers.jsonl.part"
    assert not output.exists() and len(part.read_text().splitlines()) == 3
    part.write_text(part.read_text() + '{"row": 4, "gen')  # as a full disk would leave it

    with pytest.raises(InputError, match=r"was begun with max_new_tokens 256, now it is 9"):
        answer_rows(model, rows, output, batch_size=2, max_new_tokens=9)
    found = answer_rows(model, rows, output, batch_size=2)
    assert found["strict"] == Accuracy(2, 5) and not part.exists()
    assert len({p for prompts in asked[1:] for p in prompts}) == 3
    assert len(output.read_text().splitlines()) == 5
    with pytest.raises(InputError, match=r"answers.jsonl: exists already"):
        answer_rows(model, rows, output)


def test_what_cannot_be_answered_is_refused(scripted, text_model, rows, tmp_path):
    model, asked = scripted
    output = tmp_path / "answers.jsonl"
    talk = (Message("user", "one"), Message("assistant", "many"))
    for row, message in (
        (Row(talk, "", 0, "f:7"), "f:7: no number in the answer 'many'; end it in #### 42"),
        (Row((), "a text", 0, "f:8"), "f:8: no question with an answer"),
    ):
        with pytest.raises(InputError, match=message):
            answer_rows(model, dataclasses.replace(rows, rows=(row,)), output)
    with pytest.raises(InputError, match=r"f:0: a prompt of \d+ tokens, which with 100 new ones"):
        answer_rows(text_model, rows, output, max_new_tokens=100)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        answer_rows(text_model, rows, output, max_new_tokens=0, template="plain")
    with pytest.raises(InputError, match="only scores"):
        next(continue_texts(dataclasses.replace(model, generate=None), [[1]], max_new_tokens=1))
    assert not asked and not list(tmp_path.iterdir())


def test_a_real_model_answers(text_model, rows, tmp_path):
    """Batched and padded, each row continues as it does alone."""
    prompts = [encode_prompt(row.messages[:1], "plain", text_model.tokenizer) for row in rows]
    options = {"max_new_tokens": 8, "batch_size": 4}
    together = {}
    for found in continue_texts(text_model, prompts, **options):
        together |= found
    alone = [next(continue_texts(text_model, [prompt], **options))[0] for prompt in prompts[:2]]
    assert [together[0], together[1]] == alone and sorted(together) == list(range(5))
