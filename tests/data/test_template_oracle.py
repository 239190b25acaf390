"""The tokenizer's own chat template, as transformers applies it."""

import pytest

from lora_jax.data import Message, Row, encode_prompt, prompt_text, tokenize

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

HEADERS = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message['role'] == 'system' and not loop.first %}\n"
    "        {{- raise_exception('system comes first') }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim }}\n"
    "    {{- '<|im_end|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n\\n' }}\n"
    "{%- endif %}\n"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% elif m.role == 'user' %}[INST]{{ m.content | tojson }}[/INST]"
    "{{ [m.content] | tojson(ensure_ascii=True, indent=2) }}"
    "{% if tools is not none or documents is not none %}none were given{% endif %}"
    "{% else %}{% set ns = namespace(x=m.content) %}<<{{ ns.x }}>>{% endif %}"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}\n"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}\n"
    "    {% generation %}\n"
    "{{ m.content }}<|im_end|>\n"
    "    {% endgeneration %}\n"
    "{% else %}\n"
    "{{ m.content }}<|im_end|>\n"
    "{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "<|im_start|>assistant\n"
    "{% endif %}\n"
)
TALKS = [
    [("user", "the cat"), ("assistant", "sat on the mat")],
    [
        ("system", "Be kind."),
        ("user", 'Grüße, 🌍 & "you" <there>?'),
        ("assistant", "Hello, world!\n\n1. one\n2. two"),
        ("user", "and?"),
        ("assistant", "= 4"),
    ],
]


def theirs(tokenizer):
    return transformers.AutoTokenizer.from_pretrained(tokenizer.files[0].parent)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", [HEADERS, BRACKETS, LINES])
@pytest.mark.parametrize("add_bos", [True, False])
def test_same_tokens_and_prompt(make_tokenizer, template: str, talk, add_bos: bool) -> None:
    tokenizer = make_tokenizer(chat_template=template, add_bos_token=add_bos)
    raw = [{"role": role, "content": content} for role, content in talk]
    messages = tuple(Message(role, content) for role, content in talk)
    oracle = theirs(tokenizer)

    example = tokenize(Row(messages, "", 0, "here"), tokenizer, template="tokenizer")
    wanted = oracle.apply_chat_template(raw, tokenize=False)
    ids = example.input_ids.tolist()
    begins = ids[:1] == [tokenizer.bos_id] and not wanted.startswith("<s>")
    assert tokenizer.decode(ids[begins:], special=True) == wanted
    wanted_ids = oracle.apply_chat_template(raw, return_dict=True)["input_ids"]
    assert ids[begins:] == wanted_ids

    prompt = oracle.apply_chat_template(raw[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt_text(messages[:-1], "tokenizer", tokenizer) == prompt
    ours = encode_prompt(messages[:-1], "tokenizer", tokenizer)
    assert ours == ids[: len(ours)]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", [BRACKETS, LINES])
def test_same_mask_where_the_template_marks_generation(make_tokenizer, template: str, talk) -> None:
    tokenizer = make_tokenizer(chat_template=template, add_bos_token=False)
    raw = [{"role": role, "content": content} for role, content in talk]
    wanted = theirs(tokenizer).apply_chat_template(
        raw, return_dict=True, return_assistant_tokens_mask=True
    )
    messages = tuple(Message(role, content) for role, content in talk)
    example = tokenize(Row(messages, "", 0, "here"), tokenizer, template="tokenizer")
    assert example.input_ids.tolist() == wanted["input_ids"]
    assert example.loss_mask.tolist() == [bool(x) for x in wanted["assistant_masks"]]


def test_same_ids_and_special_tokens(make_tokenizer, data_dir) -> None:
    stories = data_dir / "stories260K-hf"
    from lora_jax._tokenizer import Tokenizer

    ours = Tokenizer.from_directory(stories)
    oracle = transformers.AutoTokenizer.from_pretrained(stories)
    for text in ["Once upon a time", " Lily  ran.\n\nThe end", "Grüße 🌍", "a</s>b"]:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == oracle.decode(
            oracle.encode(text, add_special_tokens=False), skip_special_tokens=True
        )
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        oracle.bos_token_id,
        oracle.eos_token_id,
        oracle.pad_token_id,
    )
