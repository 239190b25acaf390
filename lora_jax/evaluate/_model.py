"""What an evaluation needs of a model: its tokenizer, how it scores and how it writes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._errors import InputError
from .._tokenizer import Tokenizer
from .._typing import Params
from ..models import Pretrained, generate
from ..transform import lora_linen
from ._score import Scorer, power_of_two

Generate = Callable[..., list[list[int]]]
"""`(params, prompts, *, max_new_tokens, eos_ids, pad_id, **sampling) -> new tokens of each`."""


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model that reads and writes text.

    Args:
        tokenizer: Text to ids and back.
        scorer: Log-likelihoods (`Scorer.of_apply` makes one of any function to logits).
        params: Parameters, of scorer and generate alike.
        generate: Continues prompts; None for a model that is only scored.
        eos_ids: Tokens that end a text.
    """

    tokenizer: Tokenizer
    scorer: Scorer
    params: Params = dataclasses.field(repr=False)
    generate: Generate | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, pretrained: Pretrained, params: Params | None = None, *, chunk: int = 1024
    ) -> "TextModel":
        """A model read by `load_pretrained`, with `combine(base, adapter)` as its parameters.

        Raises:
            InputError: if it came without a tokenizer.
        """
        tokenizer, config = pretrained.tokenizer, pretrained.config
        if tokenizer is None:
            raise InputError(f"{pretrained.directory}: no tokenizer.json; evaluating needs one")
        module = lora_linen(pretrained.module)
        return cls(
            tokenizer,
            Scorer.of_decoder(module, config, chunk=chunk),
            pretrained.params if params is None else params,
            functools.partial(generate, module),
            tuple(sorted({*tokenizer.stop_ids, *config.eos_token_ids})),
        )


def continue_texts(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    until: Sequence[str] = (),
    eos_ids: Sequence[int] = (),
    sampling: Mapping[str, Any] | None = None,
) -> Iterator[dict[int, str]]:
    """Continue prompts in batches, the longest first, so that few lengths are compiled.

    Args:
        model: One that generates.
        prompts: Token ids of each.
        max_new_tokens: Tokens to add at most.
        batch_size: Prompts in a batch; the last one is filled up by repeating a prompt.
        until: Texts that end a continuation; it is cut before the first of them.
        eos_ids: Tokens that do so, beside the model's.
        sampling: Options of `models.generate` such as `temperature` and `key`.

    Yields:
        Of each finished batch, the index of a prompt to its continuation.

    Raises:
        InputError: if the model does not generate, or `batch_size` is not positive.
    """
    if model.generate is None:
        raise InputError("evaluate: this model only scores; give TextModel a generate function")
    if batch_size < 1:
        raise InputError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = min(batch_size, power_of_two(len(prompts)))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        filled = chosen + chosen[-1:] * (size - len(chosen))
        new = model.generate(
            model.params,
            [prompts[i] for i in filled],
            max_new_tokens=max_new_tokens,
            eos_ids=sorted({*model.eos_ids, *eos_ids}),
            pad_id=model.tokenizer.pad_id or 0,
            **(sampling or {}),
        )
        texts = (cut_at(model.tokenizer.decode(ids), until) for ids in new)
        yield dict(zip(chosen, texts, strict=False))


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before whichever stop comes first in it; an empty one stops nothing.

    Example:
        >>> cut_at("42\\n\\nQuestion: and", ["Question:", "\\n\\n", ""])
        '42'
    """
    ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
