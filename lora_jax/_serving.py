"""A model and its adapters behind HTTP, from the words of a command."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._chat import named_adapters
from ._errors import InputError
from .models import Pretrained
from .serve import ServerSettings, read_api_keys, serve
from .train import ModelSection, load_base, run_config, with_tokens_of

_SIZES = {
    "max_rows": "max_rows",
    "max_length": "max_length",
    "prefill_chunk": "prefill_chunk",
    "adapter_slots": "adapter_slots",
    "max_lora_rank": "max_rank",
    "max_waiting": "max_waiting",
    "cache_dtype": "cache_dtype",
}
"""Options to the engine's arguments."""


def serve_command(options: argparse.Namespace, overrides: list[str]) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: for whatever does not fit, before anything is answered.
    """
    raw = {"model": {"path": options.model}, "data": {"train": "none"}, "output": "none"}
    config = run_config(raw, overrides, "serve")
    adapters = named_adapters(options.adapter)
    section = _with_tokens(config.model, adapters.values())

    def load() -> Pretrained:
        return load_base(section, config.quant)

    settings = ServerSettings(
        base_name=options.served_model_name or _name(options.model),
        template=options.template,
        api_keys=read_api_keys(options.api_key_file) if options.api_key_file else (),
        adapter_root=Path(options.adapter_root) if options.adapter_root else None,
        max_body=options.max_body,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
    )
    sizes: dict[str, Any] = {
        own: value for name, own in _SIZES.items() if (value := getattr(options, name)) is not None
    }
    serve(
        load, adapters, settings, host=options.host, port=options.port, say=_say,
        access_log=options.access_log, **sizes,
    )  # fmt: skip


def _name(model: str) -> str:
    """What a model is called where nobody says: its directory's name, or its name on the Hub."""
    return Path(model).resolve().name if os.path.isdir(model) else model


def _with_tokens(section: ModelSection, adapters: Iterable[str]) -> ModelSection:
    """The base with the tokens that its adapters bring, which must be the same."""
    brought = {directory: with_tokens_of(section, directory).add_tokens for directory in adapters}
    given = {directory: tokens for directory, tokens in brought.items() if tokens}
    if len({tuple(tokens) for tokens in given.values()}) > 1:
        raise InputError(
            f"serve: {' and '.join(list(given)[:2])} bring different tokens, and one base cannot"
            " have both; serve them by two processes"
        )
    tokens = next(iter(given.values()), section.add_tokens)
    return dataclasses.replace(section, add_tokens=tokens)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
