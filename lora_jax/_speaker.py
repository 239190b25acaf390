"""A model ready to answer: its adapter, how conversations are laid out, and what ends an answer."""

import dataclasses
from collections.abc import Sequence

from ._errors import InputError
from ._typing import Params
from .adapters import adapter_notes
from .data import Message, choose_template, encode_prompt, stop_ids
from .models import Pretrained, SamplingParams, StreamedText, stream_text
from .train import ModelSection, load_base, with_adapter, with_tokens_of
from .transform import LoraLinen, lora_linen


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model, with or without an adapter, and the template that it was trained with."""

    section: ModelSection
    pretrained: Pretrained
    model: LoraLinen
    params: Params
    template: str

    @classmethod
    def load(cls, model: str, adapter: str | None, template: str | None) -> "Speaker":
        """Read a model; the template is the one given, the adapter's, the tokenizer's, or plain."""
        return cls._of(ModelSection(path=model), adapter).adapted(adapter, template)

    @classmethod
    def _of(cls, section: ModelSection, adapter: str | None) -> "Speaker":
        """The model with the tokens that an adapter brings, and without the adapter."""
        section = with_tokens_of(section, adapter)
        pretrained = load_base(section)
        if pretrained.tokenizer is None:
            raise InputError(f"{section.path}: no tokenizer; generating text needs one")
        model = lora_linen(pretrained.module)
        return cls(section, pretrained, model, pretrained.params, "plain")

    def adapted(self, adapter: str | None, template: str | None) -> "Speaker":
        """The same model with the adapter of a directory, or without any."""
        if with_tokens_of(self.section, adapter) != self.section:
            return self._of(self.section, adapter).adapted(adapter, template)
        tokenizer = self.pretrained.tokenizer
        notes = adapter_notes(adapter) if adapter else {}
        own = "tokenizer" if tokenizer.chat_template else "plain"
        chosen = choose_template(template or notes.get("template") or own, None, tokenizer)
        params = with_adapter(self.pretrained, adapter)
        return dataclasses.replace(self, params=params, template=chosen)

    @property
    def positions(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.pretrained.config.context_length

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the answer begins."""
        try:
            "".join(message.content for message in messages).encode()
        except UnicodeEncodeError:
            raise InputError("the prompt holds bytes that are not UTF-8; remove them") from None
        return encode_prompt(messages, self.template, self.pretrained.tokenizer)

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        cache_dtype: str | None = None,
    ) -> StreamedText:
        """What the model says next, in pieces as they come."""
        tokenizer = self.pretrained.tokenizer
        ends = {*stop_ids(self.template, tokenizer), *self.pretrained.config.eos_token_ids}
        return stream_text(
            self.model,
            self.params,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            stop_ids=ends,
            cache_dtype=cache_dtype,
        )
