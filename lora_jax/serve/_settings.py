"""What a server lets its clients do."""

import dataclasses
from pathlib import Path

from .._errors import InputError


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Names, keys and limits of a server.

    Args:
        base_name: What clients call the plain base.
        template: How conversations are laid out, whatever an adapter says.
        api_keys: Any of them opens every route but `/health`, which needs none; without any, all
            are open.
        adapter_root: Where adapters lie that clients may load; None: they may load none.
        max_body: Bytes of a request at most.
        max_tokens: Tokens of an answer at most; None: as many as the engine has room for.
        max_choices: Answers that one call may ask for.
        timeout: Seconds that a call may take.

    Raises:
        InputError: if a limit is below its least, or the root is no directory.

    Example:
        >>> ServerSettings(max_choices=4).max_body
        1048576
    """

    base_name: str = "base"
    template: str | None = None
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    adapter_root: Path | None = None
    max_body: int = 1 << 20
    max_tokens: int | None = None
    max_choices: int = 16
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_tokens", "max_choices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"serve: {name} must be at least 1, got {value}")
        if not self.timeout > 0:
            raise InputError(f"serve: timeout must be above 0, got {self.timeout}")
        if not self.base_name:
            raise InputError("serve: the base needs a name; give one")
        if any(not key for key in self.api_keys):
            raise InputError("serve: an API key is empty; leave it out")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise InputError(f"serve: adapter_root {self.adapter_root} is not a directory")


def read_api_keys(file: str | Path) -> tuple[str, ...]:
    """Keys from a file that holds one in a line.

    Raises:
        InputError: if it cannot be read, holds none, or one that no header can hold.
    """
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{file}: cannot read the API keys: {reason}") from None
    keys = tuple(key for line in lines if (key := line.strip()))
    if not keys:
        raise InputError(f"{file}: holds no API key; write one in a line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"{file}: key {number} holds characters that no header can; use ASCII without"
                " spaces"
            )
    return keys
