"""YAML and command-line words into dataclasses: strict, and helpful about it."""

import dataclasses
from typing import Literal

import pytest

from lora_jax.train._schema import apply_overrides, read_dataclass, read_yaml, to_plain


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    count: int = 1
    quiet: bool = False
    kind: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    files: str | list[str] = "none"
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    limit: int | None = None


def read(text: str) -> Outer:
    return read_dataclass(Outer, read_yaml(text, "run.yaml"), "run.yaml")


def test_reads_every_kind_of_value():
    found = read(
        "{name: x, inner: {rate: 3, count: 2, quiet: true, kind: linear}, maybe: {},"
        " files: [a, b], names: {a: b}, limit: 5}"
    )
    inner = Inner(rate=3.0, count=2, quiet=True, kind="linear")
    assert found == Outer("x", inner, Inner(), ["a", "b"], {"a": "b"}, 5)
    assert type(found.inner.rate) is float


def test_absent_null_and_empty_differ():
    assert read("name: x").maybe is None
    assert read("{name: x, maybe: null}").maybe is None
    assert read("{name: x, maybe: {}}").maybe == Inner()


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "+1e-4", "0.1e-3", ".0001", "1.e-4"])
def test_small_numbers_are_numbers(number):
    assert read(f"{{name: x, inner: {{rate: {number}}}}}").inner.rate == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nam: x}", "run.yaml: nam: unknown key (did you mean 'name'?)"),
        ("{name: x, inner: {rat: 1}}", "run.yaml: inner.rat: unknown key (did you mean 'rate'?)"),
        ("{name: x, inner-count: 1}", "unknown key (did you mean 'inner.count'?)"),
        ("{name: x, zzz: 1}", "known: name, inner, maybe, files, names, limit"),
        ("{inner: {}}", "run.yaml: name is missing"),
        ("{name: 3}", "run.yaml: name: expected a text, got 3"),
        ("{name: x, inner: {count: 1.5}}", "inner.count: expected a whole number, got 1.5"),
        ("{name: x, inner: {count: true}}", "inner.count: expected a whole number, got True"),
        ("{name: x, inner: {rate: fast}}", "inner.rate: expected a number, got 'fast'"),
        ("{name: x, inner: {rate: true}}", "inner.rate: expected a number, got True"),
        ("{name: x, inner: {quiet: 1}}", "inner.quiet: expected true or false, got 1"),
        ("{name: x, inner: {kind: cosin}}", "(did you mean 'cosine'?); use cosine, linear"),
        ("{name: x, inner: }", "run.yaml: inner: must be a section of `key: value` lines"),
        ("{name: x, files: {a: b}}", "files: expected a text or a list of texts"),
        ("{name: x, files: [a, 3]}", "files: expected a text or a list of texts"),
        ("{name: x, names: {a: 3}}", "names.a: expected a text, got 3"),
        ("{name: x, names: [a]}", "names: expected a mapping"),
        ("{name: x, limit: many}", "limit: expected a whole number, got 'many'"),
        ("{name: x, 3: y}", "run.yaml: a key must be a word, got 3"),
        (
            "name: x\ninner: {rate: 1,\n  rate: 2}",
            "run.yaml:3: not YAML: key 'rate' is given twice",
        ),
        ("name: x\n  y: z", "run.yaml:2: not YAML: mapping values are not allowed here"),
    ],
)
def test_refuses(message_of, text, message):
    assert message in message_of(read, text)


def test_overrides_reach_into_sections_and_leave_the_config_alone():
    raw = {"inner": {"rate": 1}, "name": "x"}
    words = ["--inner.rate", "-1e-3", "--maybe.count=2", "--name", "a b", "--files=[a, b]"]
    found = apply_overrides(raw, words)
    assert found == {
        "inner": {"rate": -1e-3},
        "name": "a b",
        "maybe": {"count": 2},
        "files": ["a", "b"],
    }
    assert raw == {"inner": {"rate": 1}, "name": "x"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inner.rate", "3"], "'inner.rate': expected --section.key value"),
        (["--inner.rate"], "--inner.rate: the value is missing; write --inner.rate VALUE"),
        (["--inner.rate", "--name", "x"], "--inner.rate: the value is missing"),
        (["--"], "'--': expected --section.key value"),
        (["--name", "{"], "--name:1: not YAML"),
    ],
)
def test_overrides_refuse(message_of, words, message):
    assert message in message_of(apply_overrides, {}, words)


def test_plain_and_back():
    outer = Outer("x", Inner(rate=1e-4), files=["a"], names={"a": "b"})
    assert read_dataclass(Outer, to_plain(outer), "here") == outer


def test_hyphens_are_underscores_in_keys_and_stay_in_names_below():
    words = ["--train.learning-rate", "1e-3", "--lora.rank_pattern.q-proj", "4"]
    found = apply_overrides({}, words)
    assert found == {"train": {"learning_rate": 1e-3}, "lora": {"rank_pattern": {"q-proj": 4}}}
