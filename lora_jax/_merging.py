"""An adapter merged into its base, both read from directories."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ._errors import InputError
from ._quant_config import QuantConfig
from ._tree import combine
from .adapters import adapter_notes, load_adapter
from .lora import merge_adapter
from .models import load_pretrained, save_pretrained
from .train import ModelSection, load_base, stopping_config, with_tokens_of
from .transform import lora_linen


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
