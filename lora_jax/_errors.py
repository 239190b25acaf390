"""The one error for input that is wrong: it names the place, the rule and the fix."""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Something given from outside (a config, file, argument or data row) is wrong.

    The message is one line: where, which rule, what was got, what to try.  The command
    line prints it and exits with 2; Python callers can catch it as a `ValueError`.
    """


def first_line(error: BaseException) -> str:
    """The beginning of what somebody else's error says, or its type where it says nothing.

    Example:
        >>> first_line(ValueError("no such kernel\\nat line 3")), first_line(KeyError())
        ('no such kernel', 'KeyError')
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[0][:120]


def nearest(word: str, known: Iterable[str]) -> str:
    """A " (did you mean 'x'?)" for the known word closest to `word`, or an empty string.

    Example:
        >>> nearest("lora_alhpa", ["r", "lora_alpha"])
        " (did you mean 'lora_alpha'?)"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def some_of(problems: Sequence[str], shown: int = 3) -> str:
    """The first few of several problems, and how many more there are.

    Example:
        >>> some_of(["a", "b", "c"], shown=2)
        'a; b; and 1 more'
    """
    more = len(problems) - shown
    return "; ".join([*problems[:shown], *([f"and {more} more"] if more > 0 else [])])
