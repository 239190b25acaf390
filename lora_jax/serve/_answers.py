"""What the engine says, as the objects that OpenAI's clients read."""

import dataclasses
import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from .._tokenizer import Tokenizer
from ..models import TokenLogprobs
from ._api_request import ApiRequest
from ._request import Event, Ticket


class CompletionFormat:
    """The shape of `/v1/completions`: plain texts."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        """What a whole choice says."""
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """What a piece of one says."""
        return {"text": text}

    def logprobs(
        self, tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int
    ) -> dict[str, Any]:
        """Log-probabilities of tokens, the first of which stands at `offset` characters."""
        texts = [tokenizer.token_text(token.token) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {tokenizer.token_text(i): p for i, p in {**dict(t.top), t.token: t.logprob}.items()}
                for t in tokens
            ],
            "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=offset)),
        }


class ChatFormat:
    """The shape of `/v1/chat/completions`: turns of a conversation."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        said = {"content": text} if text or first else {}
        return {"delta": {"role": "assistant", **said} if first else said}

    def logprobs(
        self, tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int
    ) -> dict[str, Any]:
        content = [
            {
                **_token(token.token, token.logprob, tokenizer),
                "top_logprobs": [_token(i, p, tokenizer) for i, p in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


Format = CompletionFormat | ChatFormat


@dataclasses.dataclass(frozen=True)
class ResponseWriter:
    """Tells one call's answers.

    Args:
        request: The call.
        format: Its shape.
        tokenizer: The model's.
    """

    request: ApiRequest
    format: Format
    tokenizer: Tokenizer
    name: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """All choices, once they have ended."""
        choices = []
        for index, (ticket, echo) in enumerate(zip(tickets, self.request.echoes, strict=True)):
            done = ticket.completion
            own = self.format.choice(echo + done.text)
            choices.append(self._choice(index, own, done.finish_reason, done.logprobs, 0))
        return self._object(self.format.whole, choices) | {"usage": self.usage(tickets)}

    def piece(
        self, index: int, events: Sequence[Event], *, first: bool, offset: int
    ) -> dict[str, Any]:
        """What is new of one choice, whose tokens before have `offset` characters."""
        text = (self.request.echoes[index] if first else "") + "".join(e.text for e in events)
        own = self.format.delta(text, first=first)
        tokens = [event.logprobs for event in events if event.logprobs is not None]
        logprobs = tokens if self.request.requests[index].logprobs is not None else None
        choice = self._choice(index, own, events[-1].ending, logprobs, offset)
        usage = {"usage": None} if self.request.usage else {}
        return self._object(self.format.piece, [choice]) | usage

    def length(self, events: Sequence[Event]) -> int:
        """Characters of the tokens whose log-probabilities are told."""
        tokens = [event.logprobs.token for event in events if event.logprobs is not None]
        return sum(len(self.tokenizer.token_text(token)) for token in tokens)

    def last(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """How many tokens there were, after all pieces."""
        return self._object(self.format.piece, []) | {"usage": self.usage(tickets)}

    def usage(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Tokens read and written; a prompt of several choices counts once."""
        heads = tickets[:: self.request.choices]
        read = sum(ticket.prompt_tokens for ticket in heads)
        written = sum(len(ticket.completion.tokens) for ticket in tickets)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(t.reused_tokens for t in heads)},
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.format.prefix}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }

    def _choice(
        self,
        index: int,
        own: dict[str, Any],
        reason: str | None,
        tokens: Sequence[TokenLogprobs] | None,
        offset: int,
    ) -> dict[str, Any]:
        told = None if tokens is None else self.format.logprobs(tokens, self.tokenizer, offset)
        return {"index": index, **own, "logprobs": told, "finish_reason": reason}


def _token(number: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    own = list(tokenizer.token_bytes(number))
    return {"token": tokenizer.token_text(number), "logprob": logprob, "bytes": own}
