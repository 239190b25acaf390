"""Conversations as text: layouts, trained segments, prompts, and the sandbox."""

import dataclasses

import pytest

from lora_jax._errors import InputError
from lora_jax.data import (
    Message,
    Row,
    Rows,
    _bounded,
    choose_template,
    encode_prompt,
    prompt_text,
    stop_ids,
    tokenize,
)
from lora_jax.data._jinja import render
from lora_jax.data._template import TEMPLATES, segments

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\n' }}\n"
    "        {%- generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}\n"
    "    {%- endif %}\n"
    "    {{- '\n' }}\n"
    "{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = (
    Message("system", "Be kind."),
    Message("user", "the cat"),
    Message("assistant", "sat on the mat"),
    Message("user", "and?"),
    Message("assistant", "the dog asked"),
)


def trained(parts) -> list[str]:
    return [part.text for part in parts if part.trained]


def row_of(messages) -> Row:
    return Row(tuple(messages), "", 0, "here:1")


def rows_of(format: str) -> Rows:
    return Rows((row_of(TALK),), format, "here", {})


def test_alpaca_layout(tokenizer) -> None:
    messages = [Message("user", "Say hello.", "Nothing"), Message("assistant", "Hello")]
    parts = segments(messages, "alpaca", tokenizer)
    assert [part.trained for part in parts] == [False, True]
    assert parts[0].text == (
        "Below is an instruction, and an input to apply it to. Write a response that carries it"
        " out.\n\n### Instruction:\nSay hello.\n\n### Input:\nNothing\n\n### Response:\n"
    )
    assert parts[1].text == "Hello</s>"


def test_alpaca_with_system_and_turns(tokenizer) -> None:
    text = "".join(part.text for part in segments(TALK, "alpaca", tokenizer))
    assert text == (
        "Be kind.\n\n### Instruction:\nthe cat\n\n### Response:\nsat on the mat</s>"
        "\n\n### Instruction:\nand?\n\n### Response:\nthe dog asked</s>"
    )


def test_plain_adds_nothing(tokenizer) -> None:
    messages = [Message("user", 'def f():\n    """'), Message("assistant", "Do it.")]
    parts = segments(messages, "plain", tokenizer)
    assert [part.text for part in parts] == ['def f():\n    """', "Do it.</s>"]


def test_chatml_equals_the_jinja_template(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    ours, theirs = (segments(TALK, name, tokenizer) for name in ("chatml", "tokenizer"))
    assert "".join(part.text for part in theirs) == "".join(part.text for part in ours) + "\n"
    assert (
        trained(ours) == trained(theirs) == ["sat on the mat<|im_end|>", "the dog asked<|im_end|>"]
    )


def test_generation_tag(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED)
    parts = segments(TALK, "tokenizer", tokenizer)
    assert trained(parts) == ["sat on the mat<|im_end|>", "the dog asked<|im_end|>"]
    whole = "".join(part.text for part in parts)
    assert whole.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nthe cat")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("source", [CHATML, MARKED])
@pytest.mark.parametrize("turns", [2, 4])
@pytest.mark.parametrize("add_bos", [True, False])
def test_prompt_is_what_training_saw(
    make_tokenizer, template: str, source: str, turns: int, add_bos: bool
) -> None:
    tokenizer = make_tokenizer(chat_template=source, add_bos_token=add_bos)
    prompt = encode_prompt(TALK[:turns], template, tokenizer)
    example = tokenize(row_of(TALK[: turns + 1]), tokenizer, template=template)
    assert prompt == example.input_ids[: len(prompt)].tolist()
    assert example.loss_mask[len(prompt)]
    assert (prompt[0] == tokenizer.bos_id) is add_bos
    text = prompt_text(TALK[:turns], template, tokenizer)
    assert tokenizer.decode(prompt, special=True) == "<s>" * add_bos + text


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_that_begin_like_their_prompt_ends(make_tokenizer, template: str) -> None:
    """An answer's line breaks must not melt into a token of the prompt."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt = encode_prompt([TALK[1]], template, tokenizer)
    example = tokenize(
        row_of([TALK[1], Message("assistant", "\n\nthe mat")]), tokenizer, template=template
    )
    assert prompt == example.input_ids[: len(prompt)].tolist()
    answer = tokenizer.decode(example.input_ids[example.loss_mask])
    assert answer == "\n\nthe mat"


def test_template_without_any_mark_gets_the_end_of_sequence(make_tokenizer) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    parts = segments(TALK[1:3], "tokenizer", make_tokenizer(chat_template=template))
    assert trained(parts) == ["sat on the mat\n</s>"]


def test_a_turn_of_weight_zero_is_masked(tokenizer) -> None:
    talk = [TALK[1], Message("assistant", "no", trained=False), *TALK[3:]]
    assert trained(segments(talk, "alpaca", tokenizer)) == ["the dog asked</s>"]


def test_choice(make_tokenizer) -> None:
    with_template, without = make_tokenizer(chat_template=CHATML), make_tokenizer()
    assert choose_template("auto", rows_of("alpaca"), with_template) == "tokenizer"
    assert choose_template("auto", rows_of("alpaca"), without) == "alpaca"
    assert choose_template("auto", rows_of("prompt_completion"), with_template) == "plain"
    assert choose_template("chatml", None, without) == "chatml"
    with pytest.raises(InputError, match="did you mean 'chatml'"):
        choose_template("chatlm", None, without)
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        choose_template("tokenizer", None, without)


def test_stop_ids_hold_the_mark_that_ends_a_turn(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    both = (tokenizer.eos_id, tokenizer.token_id("<|im_end|>"))
    assert stop_ids("tokenizer", tokenizer) == stop_ids("chatml", tokenizer) == both
    assert stop_ids("alpaca", tokenizer) == tokenizer.stop_ids == (tokenizer.eos_id,)


def test_no_end_of_sequence(make_tokenizer) -> None:
    with pytest.raises(InputError, match="no end of sequence.*set eos_token"):
        segments(TALK, "alpaca", make_tokenizer(eos_token=None))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ range(99999999999) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages | }}",
        "{% generation %}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_templates_that_misbehave_are_refused(make_tokenizer, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(InputError, match=r"^here:1: chat template: .*give template: chatml") as e:
        tokenize(row_of(TALK), tokenizer, template="tokenizer")
    assert "\n" not in str(e.value)


def test_template_that_rewrites_earlier_turns(make_tokenizer) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}</s>"
    with pytest.raises(InputError, match=r"turn 3 changes the text before it.*generation %}"):
        segments(TALK, "tokenizer", make_tokenizer(chat_template=template))


def test_template_that_marks_too_few(make_tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    with pytest.raises(InputError, match="marks 1 answers .* conversation has 2"):
        segments(TALK, "tokenizer", make_tokenizer(chat_template=template))


def test_reserved_characters_in_a_message(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    with pytest.raises(InputError, match="U\\+E0F0"):
        segments([Message("user", "\ue0f0"), TALK[2]], "tokenizer", tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(999) recursive %}{{ loop(range(999)) if loop.depth < 9 }}{% endfor %}",
        "{% macro f(n) %}{% if n < 99 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}"
        "{{ f(0) }}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
        *(
            "{% set all = namespace(s='x') %}{% for i in range(60) %}" + double + "{% endfor %}"
            for double in (
                "{% set all.s = all.s + all.s %}",
                "{% set all.s = all.s ~ all.s %}",
                "{% set s %}{{ all.s }}{{ all.s }}{% endset %}{% set all.s = s %}",
                "{% set all.s = all.s | replace('x', 'xx') %}",
                "{% set all.s = all.s.replace('x', 'xx') %}",
                "{% set all.s = [all.s, all.s] | join(all.s) %}",
            )
        ),
        "{% set all = namespace(s=[]) %}{% for i in range(60) %}{% set all.s = [all.s, all.s] %}"
        "{% endfor %}{{ all.s | tojson }}",
    ],
)  # fmt: skip
def test_a_template_that_would_not_end(source, tokenizer, monkeypatch):
    monkeypatch.setattr(_bounded, "STEPS", 2000)
    monkeypatch.setattr(_bounded, "LETTERS", 200_000)
    with pytest.raises(InputError, match="does far more than a conversation needs"):
        render(TALK, dataclasses.replace(tokenizer, chat_template=source))


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ lipsum() }}"]
)
def test_what_the_sandbox_keeps_from_a_template(source, tokenizer):
    with pytest.raises(InputError, match="chat template: "):
        render(TALK, dataclasses.replace(tokenizer, chat_template=source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | map(attribute='role') | join(' ') }}", "user assistant user assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        ("{{ messages | rejectattr('role', 'equalto', 'user') | map('length') | list }}", "[2, 2]"),
        ("{{ '{} {}'.format('call', '+44 20 7946 0958 12345678901') }}",
         "call +44 20 7946 0958 12345678901"),
        ("{{ '%s' | format('12345678901') }}", "12345678901"),
    ],
)  # fmt: skip
def test_what_templates_of_others_use(source, expected, tokenizer):
    talk = [Message("user", "a"), Message("assistant", "b")] * 2
    text, _ = render(talk, dataclasses.replace(tokenizer, chat_template=source))
    assert text == expected


@pytest.mark.parametrize("more", ["", "{% set last = loop.index0 == (messages | length) - 1 %}"])
def test_a_long_conversation_is_rendered(more, tokenizer):
    turns = "{% for m in messages %}"
    own = dataclasses.replace(tokenizer, chat_template=CHATML.replace(turns, turns + more))
    text, _ = render([Message("user", "a" * 999)] * 2000, own)
    assert text.count("a" * 999) == 2000
