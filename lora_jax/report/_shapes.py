"""What the JSON files of a run hold; a part of another shape is passed over."""

from typing import Any

_Shape = Any
"""A type; {key: shape}, or {...: shape} for any keys; [shape] for a list of whatever length; a
tuple of shapes for a list of that length."""

_NUMBER = int | float
_ROWS = {
    "rows": int,
    "examples": int,
    "tokens": int,
    "trained_tokens": int,
    "truncated": int,
    "dropped": {...: int},
    "digest": str | None,  # not in runs before there was one
}
_START = {
    "time": str,
    "step": int,
    "command": str,
    "versions": dict,
    "machine": {
        "system": str,
        "processor": str,
        "cores": int | None,
        "devices": str,
        "device_bytes": int | None,
        "processes": int,
    },
}
ABOUT: dict[str, _Shape] = {
    "counts": {"trainable": int, "frozen": int, "frozen_bytes": int},
    "targets": [str],
    "data": {
        "train": {
            **_ROWS, "lengths": [(int, int)], "notes": [str], "template": str, "places": int
        },
        "eval": _ROWS,
        "rows": [{"where": str, "tokens": int, "spans": [(str, bool)]}],
    },
    "base_norms": {...: _NUMBER},
    "starts": [_START],
    "ended": {"time": str, "step": int, "early": bool},
}  # fmt: skip
"""`run.json`."""
SAMPLE: _Shape = {"prompt": str, "expected": str, "before": str, "after": str}
SUMMARY: dict[str, _Shape] = {
    "fair": {"before": _NUMBER, "after": _NUMBER},
    "merge": {"largest_difference": _NUMBER, "largest_logit": _NUMBER, "tokens": int},
    "samples": [{"input": str, "expected": str, "before": str, "after": str}],
}
"""What a report reads of `summary.json`."""


def fits(value: Any, shape: _Shape) -> bool:
    """Whether a value has a shape; keys that the shape does not name are free.

    Example:
        >>> fits({"step": 3, "more": []}, {"step": int}), fits([[1, 2], [3]], [(int, int)])
        (True, False)
    """
    match shape:
        case dict():
            return isinstance(value, dict) and all(
                fits(value.get(key), own)
                for key, own in (_any_keys(value, shape) if ... in shape else shape).items()
            )
        case [one] if isinstance(shape, list):
            return isinstance(value, list) and all(fits(own, one) for own in value)
        case tuple():
            return (
                isinstance(value, list)
                and len(value) == len(shape)
                and all(map(fits, value, shape))
            )
    return isinstance(value, shape)


def _any_keys(value: dict[str, Any], shape: dict[Any, _Shape]) -> dict[str, _Shape]:
    return dict.fromkeys(value, shape[...])


def parts(found: Any, shapes: dict[str, _Shape]) -> dict[str, Any]:
    """What of a file's content has the shape that it should have."""
    if not isinstance(found, dict):
        return {}
    return {
        key: value for key, value in found.items() if key in shapes and fits(value, shapes[key])
    }
