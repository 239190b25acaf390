"""Formats of rows, and what bad ones get."""

import csv
import json
from pathlib import Path

import pytest

from lora_jax._errors import InputError
from lora_jax.data import Message, docstring_rows, is_held_out, read_rows

USER, ASSISTANT = Message("user", "Hi"), Message("assistant", "Hello")


def write(path: Path, rows: list[object]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"instruction": "Hi", "output": "Hello"}, "alpaca", (USER, ASSISTANT)),
        (
            {"instruction": "Hi", "input": "x", "output": "Hello", "system": "Be kind"},
            "alpaca",
            (Message("system", "Be kind"), Message("user", "Hi", "x"), ASSISTANT),
        ),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["a", "b"]]},
            "alpaca",
            (Message("user", "a"), Message("assistant", "b"), USER, ASSISTANT),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "model", "content": "Hello"},
                ]
            },
            "messages",
            (USER, ASSISTANT),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "assistant", "content": "Hello", "weight": 0},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
            "messages",
            (USER, Message("assistant", "Hello", trained=False), ASSISTANT),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "system": "Be kind",
            },
            "sharegpt",
            (Message("system", "Be kind"), USER, ASSISTANT),
        ),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", (USER, ASSISTANT)),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "completion": [{"role": "assistant", "content": "Hello"}],
            },
            "messages",
            (USER, ASSISTANT),
        ),
    ],
)
def test_formats_are_detected(
    tmp_path: Path, suffix: str, row: dict, format: str, messages: tuple[Message, ...]
) -> None:
    rows = read_rows(write(tmp_path / f"rows{suffix}", [row]))
    assert rows.format == format
    assert rows.rows[0].messages == messages


def test_text_of_a_column_and_of_files(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}]))
    assert (rows.format, [row.text for row in rows]) == ("text", ["one", "two"])
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.md").write_text("# second\n")
    rows = read_rows([tmp_path / "a.txt", tmp_path / "b.md"])
    assert [(row.text, row.index) for row in rows] == [("first\n", 0), ("# second\n", 1)]
    assert rows.rows[1].where.endswith("b.md")


def test_csv_with_line_breaks_says_where(tmp_path: Path) -> None:
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["instruction", "output"], ["a\nb", "c, d"], ["e", ""]])
    rows = read_rows(tmp_path / "rows.csv", limit=1)
    assert rows.rows[0].messages == (Message("user", "a\nb"), Message("assistant", "c, d"))
    with pytest.raises(InputError, match=r"rows\.csv:4: no output; give the answer"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_cells_hold_any_character_but_their_own_delimiter(tmp_path: Path, delimiter: str) -> None:
    text = f"instruction{delimiter} output\nHi{delimiter}a\u2028b\x0cc\x85d\n"
    (tmp_path / "rows.csv").write_text(text, "utf-8")
    [row] = read_rows(tmp_path / "rows.csv")
    assert row.messages == (USER, Message("assistant", "a\u2028b\x0cc\x85d"))


def test_what_turns_hold_beside_their_text_is_reported(tmp_path: Path) -> None:
    turns = [
        {"from": "Human", "value": "Hi"},
        {"from": "GPT", "value": "Hello", "reasoning_content": "Greet."},
    ]
    rows = read_rows(write(tmp_path / "rows.jsonl", [{"conversations": turns}]))
    answer = Message("assistant", "Hello", more={"reasoning_content": "Greet."})
    assert rows.rows[0].messages == (USER, answer)
    assert rows.unused == ("conversations.reasoning_content",)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "description": "Ü"}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_calls_of_tools(tmp_path: Path, calls: dict) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, **calls},
        {"role": "tool", "name": "f", "content": {"y": "ü"}},
    ]
    row = {"messages": turns, "tools": [TOOL]}
    [read] = read_rows(write(tmp_path / "rows.jsonl", [row]))
    call = Message("assistant", "", more={"tool_calls": [CALL], "content": None})
    assert read.messages == (USER, call, Message("tool", '{"y": "ü"}', more={"name": "f"}))
    assert call.written == '{"name": "f", "arguments": {"x": 1}}'
    assert read.tools == (TOOL,)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_calls_as_turns_of_their_own(tmp_path: Path, tools: object) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"from": "observation", "value": "3"},
        {"from": "function_call", "value": "not JSON"},
    ]
    row = {"conversations": turns, "tools": tools}
    [read] = read_rows(write(tmp_path / "rows.jsonl", [row]))
    call = Message("assistant", "", more={"tool_calls": [CALL]})
    assert read.messages == (
        USER,
        call,
        Message("tool", "3"),
        Message("assistant", "not JSON"),
    )
    assert read.tools == ({"type": "function", "function": TOOL},)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows.rows[0].messages == (USER, ASSISTANT)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:50])
    with pytest.raises(InputError, match=r"cut\.parquet: not a whole Parquet file"):
        read_rows(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_rows(tmp_path / "rows.parquet")


def test_columns_are_mapped_and_the_rest_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"question": "Hi", "answer": "Hello", "id": 7}])
    rows = read_rows(file, columns={"instruction": "question", "output": "answer"})
    assert (rows.format, rows.unused) == ("alpaca", ("id",))
    assert rows.rows[0].messages == (USER, ASSISTANT)
    rows = read_rows(file, columns={"prompt": "question", "completion": "answer"})
    assert rows.format == "prompt_completion"


def test_a_column_may_be_mapped_over_one_of_our_names(tmp_path: Path) -> None:
    row = {"instruction": "Hi", "output": "wrong", "better": "Hello"}
    rows = read_rows(write(tmp_path / "rows.jsonl", [row]), columns={"output": "better"})
    assert rows.rows[0].messages == (USER, ASSISTANT)


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    lines = write(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    file = lines.rename(tmp_path / "rows.json")
    assert len(read_rows(file)) == 2


def test_limit_over_several_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": "1"}, {"text": "2"}])
    second = write(tmp_path / "b.jsonl", [{"text": "3"}, {"text": "4"}])
    assert [row.text for row in read_rows([first, second], limit=3)] == ["1", "2", "3"]


def test_numbers_are_written_out(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.jsonl", [{"instruction": "2 + 2?", "output": 4}]))
    assert rows.rows[0].messages[1].content == "4"


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    good = {"instruction": "Hi", "output": "Hello"}
    file = write(tmp_path / "rows.jsonl", [good, {"instruction": "Hi", "output": " "}, good])
    rows = read_rows(file, bad_rows="skip")
    assert [row.index for row in rows] == [0, 1]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "3"]
    assert rows.dropped == {"no output": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "Hi", "output": None}, "no output; give the answer"),
        ({"instruction": "Hi", "output": ["x"]}, "output is a list; it must be a string"),
        ({"instruction": "", "output": "x"}, "no instruction"),
        ({"instruction": "Hi", "output": "x", "history": "y"}, "history is not a list of pairs"),
        ({"instruction": "Hi", "output": "\ud800"}, "output holds half a character"),
        ({"prompt": "Hi", "completion": ""}, "no completion"),
        ({"text": "  "}, "no text"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": "Hi"}, "not a list of turns"),
        ({"messages": ["Hi"]}, "turn 1 is not an object"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer to learn from"),
        ({"messages": [{"role": "assistent", "content": "Hi"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 1 has no text"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "turn 1 is an empty answer"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "f"}]}]},
            "turn 1 calls no function by its name; write {name, arguments}",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]},
            "turn 1 has tool_calls that are no list",
        ),
        (
            {"messages": [{"role": "gpt", "function_call": {"name": "f", "arguments": "{"}}]},
            "turn 1 calls f with arguments that are no object",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": "{"},
            "tools is not a list of objects",
        ),
        ({"instruction": "Hi", "output": float("nan")}, "no output"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "turn 1 holds something other than text",
        ),
    ],
)
def test_bad_row(tmp_path: Path, row: dict, says: str) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl:1: .*{says}") as caught:
        read_rows(write(tmp_path / "a.jsonl", [row]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON .*one object a line"),
        ("a.jsonl", b"\n\n[1]\n", r"a\.jsonl:3: a row must be an object, got list"),
        ("a.json", b'[{"text": "x"},\n]', r"a\.json:(1|2): not JSON"),
        ("a.json", b"[" * 100_000, r"a\.json:1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', r"not UTF-8 \(byte 10\); save the file as UTF-8"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.txt", b" \n", "holds no rows"),
        ("a.csv", b"text,x\na,b,c\n", r"a\.csv:2: more cells than the header"),
        ("a.csv", b"text, text\na,b\n", r"a\.csv:1: the column 'text' stands twice"),
        ("a.jsonl", b"9" * 5000, r"a\.jsonl:1: not JSON"),
        ("a.csv", b'text\n"a\n', r"a\.csv:\d: not CSV"),
        ("a.xlsx", b"", r"unknown kind of file; give one of \.json"),
        ("a.jsonl", b'{"question": "x", "answer": "y"}', "columns question, answer; map them"),
        ("a.jsonl", b'{"prompt": "x", "chosen": "y", "rejected": "z"}', "preference pairs"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Hi", "answer": "Hello"}])
    with pytest.raises(InputError, match=r"no column 'questoin' .*did you mean 'question'"):
        read_rows(file, columns={"instruction": "questoin", "output": "answer"})
    with pytest.raises(InputError, match=r"maps 'instuction'.*did you mean 'instruction'"):
        read_rows(file, columns={"instuction": "question"})
    with pytest.raises(InputError, match="format alpaca needs a column 'instruction'"):
        read_rows(file, format="alpaca")
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"is a directory; give one of its files \(a\.jsonl"):
        read_rows(tmp_path)
    with pytest.raises(InputError, match="format 'alpacca' is unknown .did you mean 'alpaca'"):
        read_rows(file, format="alpacca")
    with pytest.raises(InputError, match="bad_rows must be error or skip"):
        read_rows(file, bad_rows="drop")
    with pytest.raises(InputError, match="limit must be at least 1"):
        read_rows(file, limit=0)


def test_stdlib_rows_hold_modules_out() -> None:
    rows = read_rows("stdlib-heldout", limit=5)
    assert rows.format == "alpaca" and rows.unused == ("module",)
    raw = docstring_rows(held_out=True)
    assert all(is_held_out(row["module"]) for row in raw)
    others = docstring_rows(held_out=False)
    assert not {row["input"] for row in raw} & {row["input"] for row in others}
    assert not {row["output"] for row in raw} & {row["output"] for row in others}
    # The first few stand for all.
    assert len({row["module"] for row in raw[:50]}) > 10
    assert rows.rows[0].messages[0].input == raw[0]["input"]


def test_gsm8k(data_dir: Path) -> None:
    columns = {"instruction": "question", "output": "answer"}
    rows = read_rows(data_dir / "gsm8k" / "train.jsonl", columns=columns)
    assert len(rows) == 7473
    assert rows.rows[6].messages[1].content.count("####") == 1


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("alpaca_en_demo", "alpaca", 999),
        ("alpaca_zh_demo", "alpaca", 1000),
        ("identity", "alpaca", 91),
        ("glaive_toolcall_en_demo", "sharegpt", 300),
    ],
)
def test_rows_of_another_project(data_dir: Path, name: str, format: str, count: int) -> None:
    rows = read_rows(data_dir / "alpaca_demo" / f"{name}.json")
    assert (rows.format, len(rows)) == (format, count)
    tools = [row for row in rows if row.tools]
    calls = [m for row in rows for m in row.messages if "tool_calls" in m.more]
    assert (len(tools), len(calls)) == ((191, 211) if name.startswith("glaive") else (0, 0))


def test_preference_pairs_of_another_project(data_dir: Path) -> None:
    with pytest.raises(InputError, match="preference pairs"):
        read_rows(data_dir / "alpaca_demo" / "dpo_en_demo.json")
