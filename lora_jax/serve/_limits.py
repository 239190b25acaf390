"""What an engine refuses before anything runs."""

from .._errors import InputError


def check_lengths(prompt: tuple[int, ...], limit: int, length: int, vocab: int) -> None:
    """Refuse a prompt of no tokens, of others than there are, or too long for its answer."""
    if not prompt:
        raise InputError("prompt: is empty; start it with the bos token")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise InputError(f"prompt: holds a token outside of 0..{vocab - 1}")
    if limit < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {limit}")
    if len(prompt) + limit > length:
        raise InputError(
            f"prompt: has {len(prompt)} tokens, which with {limit} new ones exceeds the engine's"
            f" {length}; shorten it or lower max_new_tokens"
        )


def check_sizes(rows: int, length: int, longest: int, chunk: int, slots: int, waiting: int) -> None:
    """Refuse an engine's sizes that are out of their range."""
    numbers = dict(max_rows=rows, max_length=length, prefill_chunk=chunk, max_waiting=waiting)
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"Engine: {name} must be at least 1, got {number}")
    if slots < 0:
        raise InputError(f"Engine: adapter_slots must be at least 0, got {slots}")
    if length > longest:
        raise InputError(
            f"Engine: max_length is {length}, but the model was made for {longest} positions"
        )
