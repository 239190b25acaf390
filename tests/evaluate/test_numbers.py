"""Numbers read from answers: never fewer right than lm-evaluation-harness's filters find."""

import json
import re
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_jax.evaluate import flexible_number, strict_number

# What the task gsm8k of lm-evaluation-harness (its version 3.0) says in YAML.
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]

numbers = st.integers(-(10**7), 10**7)
prose = st.text("ab $.,-0123456789\n", max_size=40)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 18 eggs\n#### 18", 18, 18),
        ("#### 1,000", 1000, 1000),
        ("####  $1,234.50.", "1234.5", "1234.5"),
        ("#### -7", -7, -7),
        ("#### −7", -7, -7),
        ("#### 3.0 and so on 5", 3, 5),
        ("#### 5 apples. #### 6", 5, 6),
        ("It is -$2,000.", None, -2000),
        ("It is 12 ...", None, 12),
        ("the 1.2.3rd of 7, $.", None, 7),
        ("0.50 €", None, "0.5"),
        ("none", None, None),
        ("", None, None),
        ("####", None, None),
        ("#### .", None, None),
    ],
)
def test_cases(text, strict, flexible):
    def number(x):
        return None if x is None else Decimal(x)

    assert strict_number(text) == number(strict)
    assert flexible_number(text) == number(flexible)


@given(
    numbers, st.integers(0, 3), st.sampled_from(["", "$", "€"]), st.sampled_from(["", ".", "..."])
)
def test_one_number_however_it_is_written(n, zeros, currency, end):
    sign, digits = "-" if n < 0 else "", f"{abs(n):,}"
    fraction = "." + "0" * zeros if zeros else ""
    for plain in (digits, digits.replace(",", "")):
        text = f"{sign}{currency}{plain}{fraction}{end}"
        assert strict_number(f"9 so\n#### {text}") == flexible_number(f"9 so {text} ok") == n


@given(prose, numbers)
@example("3 - ", 5)
def test_whatever_the_harness_finds_right_is_right(before, n):
    """Its filters, then its exact_match, which compares texts without what it ignores."""
    for text in (before, f"{before} {n}", f"{before}#### {n}.", f"{before} #### {n:,} {before}"):
        for pattern, at, read in ((STRICT, 0, strict_number), (FLEXIBLE, -1, flexible_number)):
            found = pattern.findall(text)
            theirs = cleaned(first(found[at])) if found else "[invalid]"
            for gold in {str(n), theirs}:
                if theirs == cleaned(gold) and number_or_none(gold) is not None:
                    assert read(text) == Decimal(cleaned(gold))


def test_every_answer_of_gsm8k_is_read(data_dir):
    """Both readings find the number after ####, which is always the last one."""
    lines = (data_dir / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    for answer in (json.loads(line)["answer"] for line in lines):
        gold = Decimal(answer.rpartition("#### ")[2].replace(",", ""))
        assert strict_number(answer) == flexible_number(answer) == gold
    assert len(lines) == 1319


def first(match):
    """As their filter does with groups."""
    return match if isinstance(match, str) else next(filter(None, match))


def cleaned(text):
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text


def number_or_none(text):
    return Decimal(text) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", text) else None
