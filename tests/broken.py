"""Files that are broken somewhere, for readers that must refuse them in a line or read them."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_jax._errors import InputError

SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.sampled_from([0.0, -0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(["", "a", "0", "\0", "\n", "\ud800", "/", "..", "None", "a" * 300, "\ufeff"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Whatever JSON can hold, and a little more: Python's reader takes NaN and infinity."""
DEEP = b"[" * 100_000


def broken_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file cut off, with bytes changed, left out or repeated, or something else altogether."""
    place = st.integers(0, len(whole))
    return st.one_of(
        place.map(lambda n: whole[:n]),
        st.tuples(place, st.integers(0, 255)).map(
            lambda t: whole[: t[0]] + bytes([t[1]]) + whole[t[0] + 1 :]
        ),
        st.tuples(place, st.binary(max_size=4)).map(lambda t: whole[: t[0]] + t[1] + whole[t[0] :]),
        st.tuples(place, place).map(lambda t: whole[: t[0]] + whole[t[1] :]),
        st.binary(max_size=20),
        st.sampled_from(
            [b"", DEEP, b"\xef\xbb\xbf" + whole, whole * 2, whole.decode("latin1").encode("utf-16")]
        ),
    )


def broken_json(whole: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one or two of its nodes replaced by others, or left out."""
    paths = list(_paths(whole))

    def replace(choices: list[tuple[tuple[Any, ...], Any, bool]]) -> Any:
        value = copy.deepcopy(whole)
        for path, other, gone in choices:
            value = _replaced(value, path, other, gone)
        return value

    change = st.tuples(st.sampled_from(paths), VALUES, st.booleans())
    return st.lists(change, min_size=1, max_size=2).map(replace)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], other: Any, gone: bool) -> Any:
    if not path:
        return other
    try:
        if len(path) == 1 and gone:
            del value[path[0]]
        else:
            value[path[0]] = _replaced(value[path[0]], path[1:], other, gone)
    except (TypeError, LookupError):  # replaced by something else before
        pass
    return value


def json_bytes(value: Any) -> bytes:
    """As a program writes it that knows nothing of surrogates."""
    return json.dumps(value).encode()


def is_read_or_refused(read: Callable[[], Any]) -> None:
    """A value, or an error for a person to read: one line."""
    try:
        read()
    except InputError as error:
        assert str(error).isprintable() or "\n" not in str(error), str(error)


def check(test: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    """Try so many examples, the same ones every time."""
    bounded = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    bounded(given(strategy)(test))()
