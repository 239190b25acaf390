"""Documents to instruction rows."""

import json
from pathlib import Path

import pytest

from lora_jax._errors import InputError
from lora_jax.data import make_rows, read_rows
from lora_jax.data._documents import document_rows

GUIDE = """---
title: not text
---
# Guide
Intro text.

## Install
Run it.
```
# not a heading
```
### On Linux
Use apt.
### On other systems
Use pip.
## FAQ
**Q: What is it?**
A: A tool.
Still the answer.

Q2: Why?
A2: Because.
## How do I stop?
Press q.
## Empty
"""
LAW = """A preamble that nothing claims.

Article 1 Scope
This law applies to cats. As said in
Article 9 of another law.

Article 2. Every cat shall have a bowl.

§ 3 Dogs
No dogs.

1.2 Titles too
Yes.

3.14 is no title, since it goes on in lower case.
"""


def put(folder: Path, **documents: str) -> Path:
    for name, text in documents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def rows_of(output: Path, name: str = "train") -> list[dict]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text("utf-8").splitlines()]


def made(tmp_path: Path, held_out: float = 0.0, **documents: str):
    card = make_rows(put(tmp_path / "in", **documents), tmp_path / "out", held_out=held_out)
    return card, rows_of(tmp_path / "out")


def test_headings_and_questions(tmp_path: Path) -> None:
    card, rows = made(tmp_path, guide_md=GUIDE)
    assert [(row["instruction"], row["output"]) for row in rows] == [
        ('What does "guide.md" say under "Guide"?', "Intro text."),
        ('What does "Guide" say under "Install"?', "Run it.\n```\n# not a heading\n```"),
        ('What does "Guide / Install" say under "On Linux"?', "Use apt."),
        ('What does "Guide / Install" say under "On other systems"?', "Use pip."),
        ("What is it?", "A tool.\nStill the answer."),
        ("Why?", "Because."),
        ("How do I stop?", "Press q."),
    ]
    assert card.documents == {"guide.md": {"heading": 5, "question and answer": 2}}
    lines = GUIDE.split("\n")
    place = rows[4]["source"]
    assert place.startswith("guide.md:") and "What is it" in lines[int(place[9:]) - 1]


def test_articles(tmp_path: Path) -> None:
    card, rows = made(tmp_path, law_txt=LAW)
    assert [(row["instruction"], row["output"]) for row in rows] == [
        (
            'What does "law.txt" say under "Article 1 Scope"?',
            "This law applies to cats. As said in\nArticle 9 of another law.",
        ),
        ('What does "law.txt" say under "Article 2"?', "Every cat shall have a bowl."),
        ('What does "law.txt" say under "§ 3 Dogs"?', "No dogs."),
        (
            'What does "law.txt" say under "1.2 Titles too"?',
            "Yes.\n\n3.14 is no title, since it goes on in lower case.",
        ),
    ]
    assert card.unused_lines == {"law.txt": 1}
    assert rows[0]["rule"] == "numbered article" and rows[0]["source"] == "law.txt:3"


@pytest.mark.parametrize(
    "table", ['Question;Answer\n"Who; me?";You\n', 'id,Q,A\n1,"Who; me?",You\n']
)
def test_tables(tmp_path: Path, table: str) -> None:
    card, rows = made(tmp_path, faq_csv=table, other_csv="a1,b1\n1,2\n")
    assert [(row["instruction"], row["output"]) for row in rows] == [("Who; me?", "You")]
    assert card.empty == ("other.csv",)


def test_the_rows_are_read_as_training_data(tmp_path: Path) -> None:
    made(tmp_path, guide_md=GUIDE)
    rows = read_rows(tmp_path / "out" / "train.jsonl")
    assert (rows.format, len(rows), rows.unused) == ("alpaca", 7, ("rule", "source"))


def test_repeats_are_removed(tmp_path: Path) -> None:
    long = "The cat shall have a bowl of water, and another one for its food."
    card, rows = made(
        tmp_path,
        a_md=f"# One\n{long}\n# Yes?\nYes.\n",
        b_md=f"# Two\n{long.upper()}  \n# yes\nYes.\n# Yes?\n yes!\n",
        c_csv="question,answer\nempty,\n",
    )
    assert [row["instruction"] for row in rows] == [
        'What does "a.md" say under "One"?',
        "Yes?",
        'What does "b.md" say under "yes"?',
    ]
    assert card.dropped == {"repeats an earlier row": 2, "no question or no answer": 1}


def test_split_by_document(tmp_path: Path) -> None:
    documents = {f"d{n}_md": f"# T{n}\nText {n}.\n# U{n}\nMore {n}.\n" for n in range(10)}
    card, train = made(tmp_path, held_out=0.3, **documents)
    held = rows_of(tmp_path / "out", "eval")
    train_documents, held_documents = (
        {row["source"].rpartition(":")[0] for row in rows} for rows in (train, held)
    )
    assert (len(train), len(held), card.train, card.held_out) == (14, 6, 14, 6)
    assert not train_documents & held_documents
    assert set(card.held_out_documents) == held_documents
    again = make_rows(tmp_path / "in", tmp_path / "again", held_out=0.3)
    assert again.held_out_documents == card.held_out_documents
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    other = make_rows(tmp_path / "in", tmp_path / "other", held_out=0.3, seed=1)
    assert other.held_out_documents != card.held_out_documents


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    card, _ = made(tmp_path, held_out=0.5, a_md="# A\nText.\n")
    assert (card.train, card.held_out) == (1, 0)
    assert "Only one document" in card.notes[0]


def test_large_documents_still_leave_something_held_out(tmp_path: Path) -> None:
    card, _ = made(tmp_path, held_out=0.1, a_md="# A\nText.\n# B\nMore.\n", b_md="# C\nOther.\n")
    assert card.held_out_documents == ("b.md",)


def test_card_says_what_was_done(tmp_path: Path) -> None:
    made(tmp_path, held_out=0.5, sub__guide_md=GUIDE, law_txt=LAW, none_txt="Just words.\n")
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| sub/guide.md | heading | 5 | no |" in text
    assert "| law.txt | numbered article | 4 | yes |" in text
    assert "- law.txt: 1 lines belong to no heading" in text
    assert "- none.txt: no heading, article or question found" in text


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    made(tmp_path, guide_md=GUIDE)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        make_rows(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", a_md="# A\nText.\n", _hidden__b_md="# B\nSecret.\n")
    card = make_rows(folder, tmp_path / "out", held_out=0)
    assert list(card.documents) == ["a.md"]


def test_output_within_the_documents_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", a_md="# A\nText.\n")
    with pytest.raises(InputError, match="would be read as a document next time"):
        make_rows(folder, folder / "below" / "out")
    assert not (folder / "below").exists()


def test_code_blocks_end_where_they_end(tmp_path: Path) -> None:
    text = (
        "# One\n```pip install x```\n# Two\n~~~\n```\n# no heading\n~~~\n"
        "# Three\n````md\n```\n# no heading either\n````\n"
    )
    rows, _ = document_rows(put(tmp_path / "in", a_md=text) / "a.md", "a.md")
    assert [row.instruction.split('"')[-2] for row in rows] == ["One", "Two", "Three"]


def test_a_long_line_of_spaces_is_no_trouble(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", a_md="# a" + " " * 100_000 + "b #\nText.\n")
    [row], _ = document_rows(folder / "a.md", "a.md")
    assert row.instruction.endswith(' b"?')


def test_a_copy_under_another_name_is_a_repeat(tmp_path: Path) -> None:
    text = "# Scope\nAll.\n\n# Start\nNow.\n"
    card = make_rows(put(tmp_path / "in", a_md=text, b_md=text), tmp_path / "out", held_out=0.5)
    assert card.dropped == {"repeats an earlier row": 2}


def test_what_differs_in_symbols_or_vowel_signs_is_no_repeat(tmp_path: Path) -> None:
    table = "question,answer\nx++,x++;\nx--,x--;\nकि,हाँ\nकी,हूँ\nWhich key?,/\n"
    card = make_rows(put(tmp_path / "in", a_csv=table), tmp_path / "out", held_out=0)
    assert (card.train, card.dropped) == (5, {})


def test_tables_keep_odd_line_breaks_and_large_cells(tmp_path: Path) -> None:
    table = f"question;answer\none;a\u2028b\x0cc\ntwo;{'x' * 200_000}\n"
    rows, _ = document_rows(put(tmp_path / "in", a_csv=table) / "a.csv", "a.csv")
    assert [len(row.output) for row in rows] == [5, 200_000]
    put(tmp_path / "bad", a_csv='"question"x,answer\na,b\n')
    with pytest.raises(InputError, match=r"a\.csv:1: not CSV"):
        make_rows(tmp_path / "bad", tmp_path / "out")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        make_rows(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="holds no document"):
        make_rows(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "in", a_txt="Just words.\n")
    with pytest.raises(InputError, match="no heading, numbered article or question in 1"):
        make_rows(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="held_out must be in"):
        make_rows(tmp_path / "in", tmp_path / "out", held_out=1.0)
    (tmp_path / "in" / "b.md").write_bytes(b"# \xff\n")
    with pytest.raises(InputError, match=r"b\.md: not UTF-8"):
        make_rows(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def questions(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    return [(row.instruction, row.output) for row in document_rows(tmp_path / name, "doc")[0]]


def test_titles_with_a_bare_number(tmp_path):
    text = "CONTRACT\n\n1. Scope\n\nIt covers all.\n\n2) Term and law\nIt lasts.\n\nLong.\n"
    assert questions(tmp_path, "a.txt", text) == [
        ('What does "doc" say under "1. Scope"?', "It covers all."),
        ('What does "doc" say under "2) Term and law"?', "It lasts.\n\nLong."),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "To buy:\n\n1. Milk\n\n2. Bread\n\n3. Eggs\n",
        "1. Milk\n2. Bread\nand butter\n",
        "1. Heat the oven.\n\nSlowly.\n\n2. Wait.\n\nThen eat.\n",
        "1. Alone\n\nOne numbered title is no numbering.\n",
    ],
)
def test_items_of_a_list_are_no_articles(tmp_path, text):
    assert questions(tmp_path, "a.txt", text) == []


def test_underlined_titles_after_front_matter_and_in_plain_text(tmp_path):
    assert questions(tmp_path, "a.md", "---\ntitle: x\n---\nGuide\n=====\n\nIntro.\n") == [
        ('What does "doc" say under "Guide"?', "Intro.")
    ]
    text = "1. Scope\n--------\nAll.\n\n2. Law\n------\n\nNone.\n"
    assert [answer for _, answer in questions(tmp_path, "b.txt", text)] == ["All.", "None."]


def test_titles_that_are_underlined(tmp_path):
    text = (
        "Guide\n=====\n\nIntro.\n\nInstall\n-------\nTwo lines\nof text\n---\nand a rule.\n\n---\n"
    )
    text += "\n```\nCode\n====\n```\n\n| a |\n|---|\n\n- item\n---\n"
    assert questions(tmp_path, "a.md", text) == [
        ('What does "doc" say under "Guide"?', "Intro."),
        ('What does "Guide" say under "Install"?', text.split("-------\n")[1].strip()),
    ]
