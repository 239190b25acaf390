"""A run's YAML file, broken somewhere: read all the same, or refused in a line."""

import json

import pytest
import yaml
from hypothesis import strategies as st

from lora_jax.train import parse_config
from tests.broken import VALUES, broken_bytes, broken_json, check, is_read_or_refused

many = pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.slow)])

RUN = {
    "model": {"path": "bundled", "add_tokens": ["<x>"]},
    "quant": {"format": "nf4", "block_size": 64},
    "lora": {
        "r": 4,
        "rank_pattern": {"q_proj": 2},
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    },
    "data": {"train": ["a.jsonl"], "columns": {"instruction": "q"}, "max_length": 64},
    "train": {"steps": 2, "learning_rate": 1e-3},
    "mesh": {"fsdp": 1, "rules": {"vocab": []}},
    "output": "x",
}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@many
def test_run_configs(examples):
    whole = yaml.safe_dump(RUN)
    texts = broken_json(RUN).map(lambda v: yaml.safe_dump(v, allow_unicode=True))
    marks = st.text(alphabet="a: -[]{}&*!|>%@`'\"\n#?,~0", max_size=30)
    odd = st.sampled_from(
        [
            BOMB,
            "&a [*a]",
            "data: &d {train: *d}",
            "!!python/object/apply:os.system [x]",
            "? [a]\n: b",
            "{[a]: b}",
            "{{a: 1}: 2}",
            "2024-02-30",
            "data: {train: 2024-01-01}",
            "!!binary x",
            "!!set {a}",
            "a: !!timestamp x",
            "<<: [1]",
            "<<: {a: 1}",
            "0x" + "f" * 5000,
            "1" * 5000,
            "1:1:1",
            "a: 0b2",
            "!!int x",
            "!!float x",
            "!!bool x",
            "--- a\n--- b",
            "\x00",
            "\ud800",
            "x: " + "[" * 5000,
            "data:\n  <<: &x {<<: *x}",
        ]
    )
    broken = broken_bytes(whole.encode()).map(lambda b: b.decode("utf-8", "replace"))
    check(
        lambda text: is_read_or_refused(lambda: parse_config(text, [], "run.yaml")),
        texts | marks | odd | broken,
        5 * examples,
    )


@many
def test_words_over_a_run_config(examples):
    text = yaml.safe_dump(RUN)
    words = st.sampled_from(
        [
            "--lora.r",
            "--data.train",
            "--train.steps",
            "--mesh.rules",
            "--quant",
            "--data.columns.x",
            "--lora.rank_pattern",
            "--output",
            "--lora.",
            "--.",
            "--model.path.x.y",
        ]
    )
    values = (
        st.text(max_size=8)
        | VALUES.map(lambda v: json.dumps(v))
        | st.sampled_from(["&a [*a]", "!!python/none x", "[" * 3000])
    )
    check(
        lambda pair: is_read_or_refused(lambda: parse_config(text, list(pair), "run.yaml")),
        st.tuples(words, values),
        2 * examples,
    )
