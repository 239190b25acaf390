"""Templates and tokenizers that do not fit each other."""

from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lora_jax._tokenizer import Tokenizer
from lora_jax.data import Message, Row, Rows, build_examples, stop_ids
from lora_jax.data._checks import template_problems

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
CHATML = LOOP % "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
FOREIGN = (
    LOOP % "<|user|>{{ m.content }}<|eot|>" + "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
TALK = (Message("user", "the cat"), Message("assistant", "sat"))


def rows_of(*messages: Message, **more: object) -> Rows:
    return Rows((Row(messages, "", 0, "here:1", **more),), "messages", "here", {})


def test_marks_that_are_cut_name_the_tokens_to_add(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=FOREIGN)
    [problem] = template_problems("tokenizer", tokenizer)
    assert problem == (
        "the template writes <|user|>, <|eot|>, <|bot|>, which the tokenizer cuts into pieces; add"
        ' them (model.add_tokens: ["<|user|>", "<|eot|>", "<|bot|>"]), or give template: alpaca'
    )
    assert problem in build_examples(rows_of(*TALK), tokenizer).report.notes


def test_turns_of_gemma_without_its_marks(make_tokenizer) -> None:
    turns = LOOP % "<start_of_turn>{{ m.role }} {{ m.content }}<end_of_turn>"
    [problem] = template_problems("tokenizer", make_tokenizer(chat_template=turns))
    assert problem.startswith("the template writes <start_of_turn>, <end_of_turn>, which")


@pytest.mark.parametrize("template", ["tokenizer", "chatml", "alpaca", "plain"])
def test_what_fits_has_no_problems(make_tokenizer, template: str) -> None:
    tokenizer = make_tokenizer(chat_template="{{ bos_token }}" + CHATML, add_bos_token=True)
    assert template_problems(template, tokenizer) == ()
    example = build_examples(rows_of(*TALK), tokenizer, template=template)[0]
    assert example.input_ids.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    ("begins", "add_bos"), [("<s>{{ bos_token }}", False), ("\n<s>", True), ("<s><s>", True)]
)
def test_a_beginning_written_twice(make_tokenizer, begins: str, add_bos: bool) -> None:
    tokenizer = make_tokenizer(chat_template=begins + CHATML, add_bos_token=add_bos)
    [problem] = template_problems("tokenizer", tokenizer)
    assert problem.startswith("sequences begin with <s> twice; take it out of the chat template")
    ids = build_examples(rows_of(*TALK), tokenizer)[0].input_ids.tolist()
    assert ids.count(tokenizer.bos_id) == 2


def test_a_template_that_refuses_is_no_problem_here(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('three turns, please') }}")
    assert template_problems("tokenizer", tokenizer) == ()


def test_an_end_of_turn_that_its_file_calls_plain(tmp_path: Path, tokenizer_json: str) -> None:
    backend = Backend.from_str(tokenizer_json)
    backend.add_tokens([AddedToken("<|stop|>", special=False)])
    template = LOOP % "{{ m.content }}<|stop|>"
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, eos_id=1, chat_template=template)
    stop = tokenizer.token_id("<|stop|>")
    examples = build_examples(rows_of(*TALK), tokenizer)
    assert examples[0].input_ids[-1] == stop and examples[0].loss_mask[-1]
    assert stop in stop_ids("tokenizer", tokenizer)
    assert not examples.report.notes


def test_a_plain_word_at_the_end_stops_nothing(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=LOOP % "{{ m.content }} the")
    assert stop_ids("tokenizer", tokenizer) == (tokenizer.eos_id,)
    example = build_examples(rows_of(*TALK), tokenizer)[0]
    assert example.input_ids[-1] == tokenizer.eos_id and example.loss_mask[-1]


def test_the_mark_after_a_generation_block_stops_too(make_tokenizer) -> None:
    inside = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=inside)
    assert tokenizer.token_id("<|im_end|>") in stop_ids("tokenizer", tokenizer)
    [note] = build_examples(rows_of(*TALK), tokenizer).report.notes
    assert note.startswith("1 of 1 rows train on no end of turn")


def test_tools_that_a_template_does_not_show(make_tokenizer) -> None:
    rows = rows_of(*TALK, tools=({"name": "f"},))
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    for template, source, shown in (
        ("tokenizer", CHATML, False),
        ("chatml", with_tools, False),
        ("tokenizer", with_tools, True),
    ):
        tokenizer = make_tokenizer(chat_template=source)
        examples = build_examples(rows, tokenizer, template=template)
        assert ("the tools of 1 rows are not shown by the template" in examples.report.notes) is (
            not shown
        )
        assert ('"name"' in tokenizer.decode(examples[0].input_ids)) is shown


def test_calls_are_lines_of_json_where_a_template_knows_none(make_tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "ü"}}}
    answer = Message("assistant", "Let me see.", more={"tool_calls": [call]})
    tokenizer = make_tokenizer()
    for template in ("alpaca", "chatml", "plain"):
        example = build_examples(rows_of(TALK[0], answer), tokenizer, template=template)[0]
        text = tokenizer.decode(example.input_ids[example.loss_mask])
        assert text == 'Let me see.\n{"name": "f", "arguments": {"x": "ü"}}'
