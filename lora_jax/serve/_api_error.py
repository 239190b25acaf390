"""What goes wrong with a call, in the body that OpenAI's clients read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_ABSOLUTE = re.compile(r"(?<![\w./])/(?:[^\s/:;,'\"]+/)*([^\s/:;,'\"]+)")


class ApiError(Exception):
    """A call that ends without an answer.

    Args:
        status: 400 for what the description of the interface does not allow, 401 without a key,
            404 for a model or route that is not there, 413 for too large a body, 422 for what is
            described but cannot be done, 429 when too many wait, 503 when the server stops, fails
            or takes too long.
        message: One line for a person.
        param: The field that it is about.
        code: One word for a program.
        headers: Of the answer.

    Example:
        >>> ApiError(404, "no such model", "model", "model_not_found").body()["error"]["code"]
        'model_not_found'
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = dict(message=self.message, type=kind, param=self.param, code=self.code)
        return {"error": error}


def without_paths(text: str, names: Mapping[Path, str] | None = None) -> str:
    """A message in which no directory of the machine is to be seen.

    Args:
        text: What an error says.
        names: What to say instead of a path; of others, the last part stays.

    Example:
        >>> without_paths("/data/a b/x.safetensors: broken", {Path("/data/a b"): "legal"})
        'legal/x.safetensors: broken'
        >>> without_paths("cannot read /etc/ssl/key.pem")
        'cannot read key.pem'
    """
    for path in _longest_first(names or {}):
        text = text.replace(str(path), (names or {})[path])
    return _ABSOLUTE.sub(r"\1", text)


def _longest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: -len(str(path)))
