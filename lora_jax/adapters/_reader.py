"""The tensors of an adapter's file, each read once, and all that does not fit told together."""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import InputError, some_of
from ..lora import OUTPUT_HEADS
from ._peft import PREFIX


class Reader:
    """The tensors of a file, each read once; what does not fit is noted, and told all together."""

    def __init__(self, file: Any) -> None:
        self.file, self.unread = file, set(file.keys())
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.foreign: list[str] = []

    def __call__(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of this shape; zeros where the file has none."""
        if key not in self.unread:
            self.missing.append(f"no tensor {key}, which the config and this base call for")
            return np.zeros(shape, np.float32)
        self.unread.remove(key)
        tensor = self.file.get_tensor(key)
        if tensor.shape != shape:
            self.misshapen.append(f"{key} has shape {tensor.shape}, this base needs {shape}")
            return np.zeros(shape, np.float32)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            self.foreign.append(f"{key} holds {tensor.dtype}, where weights are floating-point")
            return np.zeros(shape, np.float32)
        return tensor

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of a tensor that is yet to be read; None where there is none."""
        return tuple(self.file.get_slice(key).get_shape()) if key in self.unread else None

    def check(self, path: Path) -> None:
        """Refuse a file that does not fit, with the first of what is wrong of every kind.

        Raises:
            InputError: for tensors that are missing, have another shape or have no place.
        """
        homeless = [f"no place for {key}" for key in sorted(self.unread)]
        kinds = (self.misshapen, self.missing, homeless, self.foreign)
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
        wrong = [problem for problem in in_turn if problem is not None]
        if wrong:
            raise InputError(f"{path}: {some_of(wrong)}; {self._cause()}")

    def _cause(self) -> str:
        heads = [h for h in OUTPUT_HEADS for key in self.unread if key.startswith(f"{PREFIX}{h}.")]
        if heads:
            head = heads[0]
            return (
                f"it adapts {head}, which config and base do not: of its own base and this one, one"
                f" shares {head} with the embedding (tie_word_embeddings) and one does not"
            )
        return "the adapter was made for another base, or one that was changed (new tokens, say)"
