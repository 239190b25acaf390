"""What the smaller commands do: merge, generate, look at rows."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import InputError
from ._quant_config import QuantConfig
from ._tree import combine
from ._typing import Params
from .adapters import load_adapter
from .data import (
    Examples,
    Message,
    Rows,
    choose_template,
    encode_prompt,
    stop_ids,
)
from .lora import merge_adapter
from .models import Pretrained, generate, load_pretrained, save_pretrained
from .train import (
    ModelSection,
    RunConfig,
    adapter_notes,
    examples_of,
    load_base,
    stopping_config,
    training_rows,
    with_adapter,
    with_length,
    with_tokens_of,
)
from .transform import LoraLinen, lora_linen


def rows_and_examples(config: RunConfig) -> tuple[Rows, Examples, Any]:
    """The rows of `data.train`, their tokens, and the tokenizer; no weights are read."""
    from .train import load_tokenizer

    rows = training_rows(config.data)
    pretrained = load_tokenizer(config.model)
    data = with_length(config.data, pretrained)
    return rows, examples_of(rows, data, pretrained), pretrained.tokenizer


def merge_directories(model: str, adapter: str, output: str, dtype: str, quant: str | None) -> str:
    """Merge, save, read back and compare; gives a line that says by how much they differ.

    Raises:
        InputError: if the output holds something, or the adapter is of another base.
    """
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{output}: holds something already; give an empty directory")
    own = QuantConfig(format=quant) if quant else None  # type: ignore[arg-type]
    base = load_base(with_tokens_of(ModelSection(path=model), adapter), own)
    loaded, _ = load_adapter(adapter, base.params, layouts=base.layouts)
    merged = merge_adapter(base.params, loaded, layouts=base.layouts, dtype=jnp.float32)
    template = adapter_notes(adapter).get("template")
    config = stopping_config(base, template) if template else base.config
    save_pretrained(output, merged, config, dtype=dtype, tokenizer=base.tokenizer)
    again = load_pretrained(output)
    length = min(64, base.config.max_position_embeddings)
    probe = jnp.asarray(np.arange(length)[None] % base.config.vocab_size)
    wrapped = lora_linen(base.module)
    expected = wrapped.apply({"params": combine(base.params, loaded)}, probe)
    found = again.module.apply({"params": again.params}, probe)
    difference = float(jnp.abs(expected - found).max() / jnp.abs(expected).max())
    return (
        f"{output}: merged in {dtype}; read back, its logits differ from base and adapter by"
        f" {difference:.1e} of the largest"
    )


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model ready to answer prompts."""

    pretrained: Pretrained
    model: LoraLinen
    params: Params
    template: str

    @classmethod
    def load(cls, model: str, adapter: str | None, template: str | None) -> "Speaker":
        """Read a model; the template is the one given, the adapter's, the tokenizer's, or plain."""
        pretrained = load_base(with_tokens_of(ModelSection(path=model), adapter))
        if pretrained.tokenizer is None:
            raise InputError(f"{model}: no tokenizer; generating text needs one")
        notes = adapter_notes(adapter) if adapter else {}
        own = "tokenizer" if pretrained.tokenizer.chat_template else "plain"
        chosen = template or notes.get("template") or own
        chosen = choose_template(chosen, None, pretrained.tokenizer)
        params = with_adapter(pretrained, adapter)
        return cls(pretrained, lora_linen(pretrained.module), params, chosen)

    def answer(self, prompt: str, *, seed: int = 0, **sampling: Any) -> str:
        """The model's continuation of one prompt; `sampling` as in `models.generate`."""
        tokenizer = self.pretrained.tokenizer
        if not 0 <= seed < 2**63:
            raise InputError(f"seed: must be from 0 to 2^63 - 1, got {seed}")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt holds bytes that are not UTF-8; remove them") from None
        ids = encode_prompt([Message("user", prompt)], self.template, tokenizer)
        ends = {*stop_ids(self.template, tokenizer), *self.pretrained.config.eos_token_ids}
        new = generate(
            self.model,
            self.params,
            [ids],
            key=jax.random.key(seed),
            eos_ids=sorted(ends),
            pad_id=tokenizer.pad_id or 0,
            **sampling,
        )
        return tokenizer.decode(new[0])
