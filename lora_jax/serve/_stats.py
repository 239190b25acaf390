"""What an engine tells of itself."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine does now, and counts of tokens since it began.

    `on_device` are adapters in slots.  `reused_tokens` are those of prompts that another request
    had read before.
    """

    running: int
    waiting: int
    on_device: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
