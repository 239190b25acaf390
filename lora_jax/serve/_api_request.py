"""From the body of a call to requests of the engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .._errors import InputError
from ..models import SamplingParams
from ._api_error import ApiError
from ._catalog import Catalog, ServedModel
from ._request import Request

_SAMPLING = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_USUAL_TOKENS = 16
"""Tokens that a text is continued by where its client does not say."""


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """A call: requests for each choice of each prompt in turn, and how they are to be told.

    `echoes`: the text that each choice begins with.  `choices`: of each prompt.
    """

    model: str
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    choices: int
    stream: bool
    usage: bool


def completion(body: dict[str, Any], catalog: Catalog) -> ApiRequest:
    """What `/v1/completions` is asked for.

    Raises:
        ApiError: if there is no such model, or no room for the prompts.
    """
    model, tokenizer = catalog.model(body.get("model")), catalog.tokenizer
    if body.get("echo") and "logprobs" in body:
        raise ApiError(422, "echo: log-probabilities of prompts are not supported", "echo")
    given = body["prompt"]
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    choices = _choices(body, len(prompts), catalog)
    ids = _ids(prompts, catalog)
    echoes = [""] * len(ids)
    if body.get("echo"):
        echoes = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
    said = "max_tokens" if "max_tokens" in body else None
    most = body.get("max_tokens", _USUAL_TOKENS)
    requests = _requests(
        ids, body, catalog, model,
        limits=[_limit(i, most, said, catalog, "prompt") for i in ids],
        choices=choices, stop_ids=catalog.text_stop_ids, logprobs=body.get("logprobs"),
    )  # fmt: skip
    return _assembled(body, model, requests, echoes, choices)


def chat(body: dict[str, Any], catalog: Catalog) -> ApiRequest:
    """What `/v1/chat/completions` is asked for.

    Raises:
        ApiError: if there is no such model, the template does not take the conversation, or it is
            too long.
    """
    model, choices = catalog.model(body.get("model")), _choices(body, 1, catalog)
    ids = catalog.prompt(model, body["messages"])
    said = next((n for n in ("max_completion_tokens", "max_tokens") if n in body), None)
    most = body[said] if said else catalog.room(len(ids))
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
    requests = _requests(
        [ids], body, catalog, model,
        limits=[_limit(ids, most, said, catalog, "messages")],
        choices=choices, stop_ids=catalog.stop_ids(model),
        logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
    )  # fmt: skip
    return _assembled(body, model, requests, [""], choices)


def _choices(body: dict[str, Any], prompts: int, catalog: Catalog) -> int:
    """How many answers each prompt is to have; refused before anything long is done."""
    choices, engine = body.get("n", 1), catalog.engine
    most = min(catalog.settings.max_choices, engine.max_rows + engine.max_waiting)
    if prompts * choices > most:
        raise ApiError(
            400,
            f"n: {prompts} prompts with {choices} answers each, but one call may have {most} in"
            " all; make several calls",
            "n",
        )
    return choices


def _ids(prompts: Sequence[Any], catalog: Catalog) -> list[Any]:
    """Token ids of prompts that are texts or ids already."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        catalog.check_text(len(text), "prompt")
    tokenizer = catalog.tokenizer
    # Several at once, which lets other threads go on meanwhile.
    encoded = iter(tokenizer.encode_segments([[text] for text in texts]))
    return [
        tokenizer.with_bos(next(encoded)[0]) or catalog.beginning if isinstance(p, str) else p
        for p in prompts
    ]


def _assembled(
    body: dict[str, Any],
    model: ServedModel,
    requests: tuple[Request, ...],
    echoes: Sequence[str],
    choices: int,
) -> ApiRequest:
    return ApiRequest(
        model=model.name,
        requests=requests,
        echoes=tuple(echo for echo in echoes for _ in range(choices)),
        choices=choices,
        stream=body.get("stream", False),
        usage=body.get("stream_options", {}).get("include_usage") or False,
    )


def _limit(ids: Sequence[int], most: int, said: str | None, catalog: Catalog, field: str) -> int:
    """How many tokens an answer may have: refused if the client says too many, else cut.

    `said` is the field in which it does.
    """
    room, limit = catalog.room(len(ids)), most
    own = catalog.settings.max_tokens
    if said and own is not None and limit > own:
        raise ApiError(400, f"{said}: at most {own} on this server, got {limit}", said)
    if room < 1 or (said and limit > room):
        least = limit if said else 1
        raise ApiError(
            400,
            f"{field}: has {len(ids)} tokens, which with {least} new ones exceeds the"
            f" {len(ids) + room} that there is room for; shorten it or lower"
            f" {said or 'max_tokens'}",
            field,
            "context_length_exceeded",
        )
    return min(limit, room, own or limit)


def _requests(
    prompts: Sequence[Sequence[int]],
    body: dict[str, Any],
    catalog: Catalog,
    model: ServedModel,
    *,
    limits: Sequence[int],
    choices: int,
    stop_ids: frozenset[int],
    logprobs: int | None,
) -> tuple[Request, ...]:
    ends = frozenset() if body.get("ignore_eos") else stop_ids
    ends = ends.union(body.get("stop_token_ids", ()))
    return tuple(
        Request(
            ids,
            adapter=model.adapter,
            max_new_tokens=limit,
            sampling=_sampling(body, choice),
            stop=body.get("stop", ()),
            stop_ids=ends,
            logprobs=logprobs,
            timeout=catalog.settings.timeout,
        )
        for ids, limit in zip(prompts, limits, strict=True)
        for choice in range(choices)
    )


def _sampling(body: dict[str, Any], choice: int) -> SamplingParams:
    """Each choice has a seed of its own: the one given, and those that follow it."""
    seed = body.get("seed")
    try:
        return SamplingParams(
            temperature=body.get("temperature", 1.0),
            top_k=max(body.get("top_k", 0), 0),
            seed=None if seed is None else (seed + choice) % 2**63,
            **{name: body[name] for name in _SAMPLING if name in body},
        )
    except InputError as error:
        raise ApiError(400, str(error)) from None
