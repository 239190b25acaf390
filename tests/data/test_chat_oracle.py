"""Chat templates in the styles of the model families, as transformers applies them.

The templates are written here.  ⟪ and ⟫ stand where `{% generation %}` begins and ends: with it
transformers gives the mask, without it the answers have to be found.
"""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from lora_jax._tokenizer import Tokenizer
from lora_jax.data import Row, encode_prompt, read_rows, stop_ids, tokenize
from lora_jax.data._checks import template_problems

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nTools:"
    "{% for t in tools %}\n{{ t | tojson(indent=4) }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n⟪"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>⟫{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% if tools %}<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n⟪"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}"
    "<|im_end|>⟫{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n⟪"
    "{% if m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ content.lstrip('\\n') }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>⟫{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]"
    "{% else %}⟪{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]{% else %} {{ m.content | trim }}{% endif %}"
    "{{ eos_token }}⟫{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.first = m.content + '\\n\\n' %}{% continue %}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n⟪{{ ns.first }}"
    "{{ m.content | trim }}<end_of_turn>⟫{{ '\\n' }}{% set ns.first = '' %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n⟪{{ m.content }}<|end|>⟫{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>⟪{{ m.content }}<|im_end|>⟫"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
SMOLLM3 = (
    "{% set think = enable_thinking if enable_thinking is defined else true %}"
    "<|im_start|>system\nToday is {{ strftime_now('%Y') | length }} long. "
    "{% if messages[0].role == 'system' %}{{ messages[0].content.replace('/no_think', '') }}"
    "{% if '/no_think' in messages[0].content %}{% set think = false %}{% endif %}{% endif %}"
    "{% for t in tools or [] %}\n{{ t.function | string }}{% endfor %}<|im_end|>\n"
    "{% for m in messages %}{% if loop.first and m.role == 'system' %}{% continue %}{% endif %}"
    "<|im_start|>{{ m.role }}\n⟪{% if m.role == 'assistant' and not think %}"
    "<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>⟫{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi3": PHI3,
    "phi4": PHI4,
    "smollm3": SMOLLM3,
}
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
WITH_TOOLS = ("llama3", "qwen2", "qwen3", "mistral")
MARKS = [
    *["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"],
    *["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_sep|>", "[INST]", "[/INST]"],
    *["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": 'Grüße, 🌍 & "you" <there>? 你好'},
    {"role": "assistant", "content": "Hello, world!\n\n1. one\n2. two"},
    {"role": "user", "content": "and? مرحبا"},
    {"role": "assistant", "content": "= 4"},
]
SAME_ANSWERS = [
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes", "reasoning_content": "Is it?"},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "<think>\nIs it?\n</think>\n\nyes"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "yes"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town, in °C.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALLS = [
    {"role": "user", "content": "How warm is it in Zürich & 東京?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Two towns.",
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "weather", "arguments": {"town": "Zürich", "near": None}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "17 °C <sun>"},
    {"role": "assistant", "content": "17 °C.", "reasoning_content": "I see."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye", "reasoning_content": "Be short."},
]


def source(name: str, *, marked: bool) -> str:
    tagged = (
        r"{% if m.role == 'assistant' %}{% generation %}\1{% endgeneration %}"
        r"{% else %}\1{% endif %}"
    )
    return re.sub("⟪(.*?)⟫", tagged if marked else r"\1", TEMPLATES[name], flags=re.DOTALL)


@pytest.fixture(scope="module")
def backend_json(tokenizer_json: str) -> str:
    backend = Backend.from_str(tokenizer_json)
    backend.add_special_tokens(MARKS)
    return backend.to_str()


@pytest.fixture
def make(tmp_path: Path, backend_json: str):
    def made(name: str, *, marked: bool) -> Tokenizer:
        directory = tmp_path / f"{name}-{marked}"
        directory.mkdir()
        (directory / "tokenizer.json").write_text(backend_json)
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "chat_template.jinja").write_text(source(name, marked=marked), "utf-8")
        return Tokenizer.from_directory(directory)

    return made


def row_of(tmp_path: Path, turns: list, tools: list | None = None) -> Row:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns, **({"tools": tools} if tools else {})}))
    return read_rows(file).rows[0]


CASES = [
    *[(name, TALK, None) for name in TEMPLATES],
    *[(name, SAME_ANSWERS, None) for name in TEMPLATES],
    *[(name, CALLS, [WEATHER]) for name in WITH_TOOLS],
    *[(name, CALLS[:4], [WEATHER]) for name in WITH_TOOLS],
]


@pytest.mark.parametrize(("name", "turns", "tools"), CASES)
def test_same_tokens_and_mask(make, tmp_path: Path, name: str, turns, tools) -> None:
    marked, bare = make(name, marked=True), make(name, marked=False)
    oracle = transformers.AutoTokenizer.from_pretrained(marked.files[0].parent)
    wanted = oracle.apply_chat_template(
        turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    row = row_of(tmp_path, turns, tools)
    for tokenizer in (marked, bare):
        example = tokenize(row, tokenizer, template="tokenizer")
        assert example.input_ids.tolist() == wanted["input_ids"]
        assert example.loss_mask.tolist() == [bool(x) for x in wanted["assistant_masks"]]
    prompt = oracle.apply_chat_template(
        turns[:-1], tools=tools, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert encode_prompt(row.messages[:-1], "tokenizer", bare, row.tools) == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_with_what_stops_generation(make, tmp_path: Path, name: str) -> None:
    end = ENDS.get(name, "<|im_end|>")
    for tokenizer in (make(name, marked=True), make(name, marked=False)):
        example = tokenize(row_of(tmp_path, TALK), tokenizer, template="tokenizer")
        trained = example.input_ids[example.loss_mask].tolist()
        number = tokenizer.token_id(end)
        assert trained[-1] == number and trained.count(number) == 2
        assert set(stop_ids("tokenizer", tokenizer)) == {number, tokenizer.eos_id}
        assert template_problems("tokenizer", tokenizer) == ()


def test_calls_as_texts_are_the_same(make, tmp_path: Path) -> None:
    tokenizer = make("qwen2", marked=False)
    call = CALLS[1]["tool_calls"][0]["function"]
    texts = {**call, "arguments": json.dumps(call["arguments"])}
    spelled = [
        {"tool_calls": [{"id": "call00001", "type": "function", "function": texts}]},
        {"tool_calls": json.dumps(CALLS[1]["tool_calls"])},
        {"function_call": texts},
    ]
    wanted = tokenize(row_of(tmp_path, CALLS, [WEATHER]), tokenizer, template="tokenizer")
    for calls in spelled:
        turns = [CALLS[0], {"role": "assistant", **calls}, *CALLS[2:]]
        example = tokenize(row_of(tmp_path, turns, [WEATHER]), tokenizer, template="tokenizer")
        assert example.input_ids.tolist() == wanted.input_ids.tolist()
    talk = [
        {"from": "human", "value": CALLS[0]["content"]},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": CALLS[2]["content"]},
        *({"from": m["role"], "value": m["content"]} for m in CALLS[3:]),
    ]
    file = tmp_path / "sharegpt.json"
    tools = json.dumps([WEATHER["function"]])
    file.write_text(json.dumps([{"conversations": talk, "tools": tools}]))
    example = tokenize(read_rows(file).rows[0], tokenizer, template="tokenizer")
    assert example.input_ids.tolist() == wanted.input_ids.tolist()


def test_the_template_for_tools(make, tmp_path: Path) -> None:
    directory = make("qwen2", marked=False).files[0].parent
    (directory / "chat_template.jinja").unlink()
    named = {"default": source("phi4", marked=False), "tool_use": source("qwen2", marked=False)}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": n, "template": text} for n, text in named.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(directory)
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    for turns, tools in ((TALK, None), (CALLS, [WEATHER])):
        wanted = oracle.apply_chat_template(turns, tools=tools, return_dict=True)["input_ids"]
        example = tokenize(row_of(tmp_path, turns, tools), tokenizer, template="tokenizer")
        assert example.input_ids.tolist() == wanted
