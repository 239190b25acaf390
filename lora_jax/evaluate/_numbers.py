"""The number that a text ends in, read as lm-evaluation-harness reads it and then as a number."""

import re
from decimal import Decimal, InvalidOperation

_RUN = re.compile(r"[-−]?[$€£0-9.,]+")
_MARKED = re.compile(r"####[ \t]*([-−]?[$€£0-9.,]+)")


def strict_number(text: str) -> Decimal | None:
    """The number after the first `####` that has one, as GSM8K writes its answers.

    Example:
        >>> strict_number("6 * 3 = 18 eggs\\n#### $1,018.00"), strict_number("It is 18.")
        (Decimal('1018.00'), None)
    """
    return next((n for run in _MARKED.findall(text) if (n := _number(run)) is not None), None)


def flexible_number(text: str) -> Decimal | None:
    """The last number in a text, wherever it stands.

    Example:
        >>> flexible_number("She sells 9 eggs and makes $18.")
        Decimal('18')
    """
    runs = reversed(_RUN.findall(text))
    return next((n for run in runs if (n := _number(run)) is not None), None)


def _number(run: str) -> Decimal | None:
    """A run of digits, points, commas and signs of currency.

    Commas go wherever they stand, and points at the end: the harness ignores them too.  Decimals
    are equal as numbers: 3.0 is 3, where it compares their texts.
    """
    try:
        return Decimal(re.sub(r"[$€£,]", "", run).replace("−", "-").rstrip("."))
    except InvalidOperation:
        return None
