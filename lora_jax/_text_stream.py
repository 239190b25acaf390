"""Text as its tokens come, character by whole character."""

from typing import SupportsInt

from ._tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 3
"""Bytes of a UTF-8 character of which only the last is missing, each shown as a mark at most."""


class TextStream:
    """Decode one token at a time: the pieces joined are `tokenizer.decode` of all the tokens.

    A character whose bytes are spread over several tokens comes out when it is whole.  What is
    decoded again at each step is only the last few tokens, so a text of n tokens takes O(n).

    Args:
        tokenizer: The model's tokenizer.
        special: Whether marks such as `</s>` are written too.

    Example:
        >>> from tokenizers import Tokenizer as Backend, decoders, models
        >>> from lora_jax._tokenizer import Tokenizer
        >>> backend = Backend(models.BPE({"h": 0, "i": 1, "Ã": 2, "©": 3}, []))
        >>> backend.decoder = decoders.ByteLevel()
        >>> stream = TextStream(Tokenizer(backend, {}))
        >>> [stream.push(token_id) for token_id in (0, 1, 2, 3, 2)], stream.finish()
        (['h', 'i', '', 'é', ''], '�')
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []
        self._context = 0  # How many of those ids only say how the others are to be read.
        self._given = 0  # How many characters of their text have been given.

    def push(self, token_id: SupportsInt) -> str:
        """The text that is certain now and was not before; often empty."""
        number = int(token_id)
        if not self._special and number in self._tokenizer.special_ids:
            return ""
        self._ids.append(number)
        text = self._decode(self._ids)
        certain = len(text) - _unfinished(text)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._forget()
        return piece

    def finish(self) -> str:
        """What is left: a character that was never completed, as U+FFFD.  Starts afresh."""
        rest = self._decode(self._ids)[self._given :]
        self._ids, self._context, self._given = [], 0, 0
        return rest

    def _forget(self) -> None:
        """Keep the last tokens alone, unless they have no text: then they tell no beginning."""
        last = self._ids[self._context :]
        text = self._decode(last)
        if text:
            self._ids, self._context, self._given = last, len(last), len(text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, special=self._special)


def _unfinished(text: str) -> int:
    """Marks at the end that another token may still turn into a character."""
    return min(len(text) - len(text.rstrip(_UNFINISHED)), _LONGEST)
