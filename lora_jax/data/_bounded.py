"""A Jinja sandbox whose templates come to an end: how far they count and write has a limit.

Jinja's own keeps a template from the process it runs in, but not from taking all its time and
memory: `{% for a in range(99999) %}{% for b in range(99999) %}`, or a text doubled forty times.
"""

import contextlib
import contextvars
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS, LETTERS = 200_000, 30_000_000
"""Turns of loops and calls of one rendering, and what all of them read and write."""
_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("left")


@contextlib.contextmanager
def bounded(given: Any) -> Iterator[None]:
    """What is compiled or rendered within has `STEPS` and `LETTERS` of its own.

    Args:
        given: What is rendered: who reads a hundred times that is still at work on it.
    """
    before = _left.set([STEPS, max(LETTERS, 100 * _size(given, 10 * LETTERS))])
    try:
        yield
    finally:
        _left.reset(before)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, where loops, calls, filters, operators and all that is written are counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        own = {**self.filters, **filters}
        self.filters = {name: _counted(function, name) for name, function in own.items()}
        self.filters[_TURNS], self.filters[_TEXT] = _turns, _text
        del self.globals["lipsum"]  # which nothing counts

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spend(1, _cost(operator, left, right))
        result = super().call_binop(context, operator, left, right)
        _spend(letters=_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        made = super().wrap_str_format(value)
        if made is not None:
            made.__self__ = value.__self__  # type: ignore[attr-defined]
        return made

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, LoopContext):  # a recursive loop, whose turns are counted too
            args = (_turns(context, args[0]), *args[1:])
        name = getattr(function, "__name__", "")
        given = (getattr(function, "__self__", None), *args, *kwargs.values())
        _spend(1, _cost(name, *given))
        result = super().call(context, function, *args, **kwargs)
        _spend(letters=_size(result))
        return result

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = _through(_TURNS, loop.iter)
        for joined in source.find_all(nodes.Concat):
            joined.nodes = [_through(_TEXT, node) for node in joined.nodes]
        for output in source.find_all(nodes.Output):
            output.nodes = [
                _through(_TEXT, nodes.Const(own.data))
                if isinstance(own, nodes.TemplateData)
                else own
                for own in output.nodes
            ]
        return super()._generate(source, *args, **kwargs)


_TURNS, _TEXT = "turns of a loop", "text"


def _through(filter: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, filter, [], [], None, None, lineno=node.lineno)


# What has the context for an argument is left for the rendering, not worked out while compiling.
@pass_context
def _turns(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(1)
        yield item


@pass_context
def _text(context: Any, value: Any) -> Any:
    _spend(letters=_size(value))
    return value


def _written(value: Any) -> Any:
    _spend(letters=_size(value))
    return value


def _counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _spend(1, _cost(name, *args, *kwargs.values()))
        result = function(*args, **kwargs)
        _spend(letters=_size(result))
        return result

    return counted


def _spend(steps: int = 0, letters: int = 0) -> None:
    left = _left.get()
    left[0] -= steps
    left[1] -= letters
    if min(left) < 0:
        raise SecurityError("it does far more than a conversation needs")


def _cost(name: str, *given: Any) -> int:
    """What an operation reads, and writes where that may be far more."""
    if name in _GLANCES:
        return 0
    read = _size(given)
    texts = [value for value in given if isinstance(value, str)]
    parts = itertools.chain(*(v if isinstance(v, tuple) else (v,) for v in given))
    numbers = [abs(value) for value in parts if isinstance(value, int)]
    if name in ("%", "format"):
        # Widths stand in the format, or, where it says so, among what is put into it.
        widths = [int(digits) for text in texts[:1] for digits in re.findall(r"\d+", text)]
        given_widths = any(re.search(r"%[^a-zA-Z%]*\*|\{[^}]*\{", text) for text in texts[:1])
        return read + sum(widths) + (sum(numbers) if given_widths else 0)
    if name in _REPEATING and (texts or name == "**" or len(numbers) < 2):
        return read + read * max(numbers, default=0)
    if name == "replace" and len(texts) > 2:
        return read + texts[0].count(texts[1]) * len(texts[2])
    if name == "+":
        return read
    if name in ("join", "wordwrap", "urlize") and texts:
        return read + read * max(map(len, texts))
    return read + sum(numbers)


_GLANCES = ("length", "count", "first", "last")
"""What reads no more of a sequence than that; templates ask for the length in each turn."""
_REPEATING = ("*", "**", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson")


def _size(value: Any, enough: int | None = None) -> int:
    """Letters of a value and all it holds, each part at thirty; it stops counting at `enough`."""
    enough = _left.get()[1] if enough is None else enough
    total, left = 0, [value]
    while left and total <= enough:
        own = left.pop()
        if isinstance(own, Context):  # what filters such as `map` are given first
            continue
        if isinstance(own, str | bytes):
            total += len(own)
        elif isinstance(own, int):
            total += own.bit_length() // 8
        elif isinstance(own, Mapping):
            total += 30 * len(own)
            left += [*own.keys(), *own.values()]
        elif isinstance(own, Sequence | Set):
            total += 30 * len(own)
            left += () if isinstance(own, range) else own
    return total
