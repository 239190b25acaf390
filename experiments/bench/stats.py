"""Medians, quartiles and ratios within rounds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Samples = dict[str, dict[str, list[float]]]
"""Figures by case and metric, one for each round."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and number.

    >>> spread([4.0, 1.0, 3.0, 2.0, 5.0])
    {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'min': 1.0, 'n': 5}
    >>> spread([2.0])
    {'median': 2.0, 'q1': 2.0, 'q3': 2.0, 'min': 2.0, 'n': 1}
    """
    if len(values) == 1:
        q1 = middle = q3 = values[0]
    else:
        q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": q1, "q3": q3, "min": min(values), "n": len(values)}


def ratio(of: Sequence[float], over: Sequence[float]) -> dict[str, float]:
    """The spread of the quotients of one round each: what slows a round slows both its sides.

    >>> ratio([2.0, 40.0], [1.0, 20.0])
    {'median': 2.0, 'q1': 2.0, 'q3': 2.0, 'min': 2.0, 'n': 2}
    """
    return spread([a / b for a, b in zip(of, over, strict=True)])


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: everybody comes first, and after everybody else, in turn.

    Every second time round the order is reversed, so that nobody always follows the same one.

    >>> [rotated("abc", turn) for turn in range(4)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['c', 'b', 'a']]
    """
    order = list(names) if turn // len(names) % 2 == 0 else list(reversed(names))
    first = turn % len(names)
    return order[first:] + order[:first]


def met(value: float, target: str | None) -> str:
    """Whether a target such as '<= 0.75' or '>= 13000' is met.

    >>> met(0.7, "<= 0.75"), met(1.4, ">= 1.5"), met(1.0, None)
    ('yes', 'no', '')
    """
    if target is None:
        return ""
    sign, bound = target.split()
    ok = value <= float(bound) if sign == "<=" else value >= float(bound)
    return "yes" if ok else "no"


def disagreement(values: Mapping[str, Sequence[float]], tolerance: float) -> str | None:
    """Which two cases' losses differ by more than a relative tolerance, if any do.

    Shorter lists are compared as far as they go.

    >>> disagreement({"a": [1.0, 2.0], "b": [1.0005, 2.0]}, 1e-3)
    >>> disagreement({"a": [1.0, 2.0], "b": [1.0, 2.1]}, 1e-3)
    'a has 2.000000 and b 2.100000 at step 1'
    """
    for (a, of_a), (b, of_b) in _pairs(values):
        for step, (x, y) in enumerate(zip(of_a, of_b, strict=False)):
            if not abs(x - y) <= tolerance * abs(x):  # true of nan too
                return f"{a} has {x:.6f} and {b} {y:.6f} at step {step}"
    return None


def _pairs(values: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    items = list(values.items())
    return [(items[0], item) for item in items[1:]]
