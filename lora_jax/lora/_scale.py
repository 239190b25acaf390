"""Adapters made stronger, weaker or opposite."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from .._errors import InputError
from .._tree import map_with_path
from .._typing import Array, Params
from ._single_layers import whole_parameters


def scale_adapter(adapter: Params, factor: float | Float[Array, ""]) -> Params:
    """The adapter whose delta is `factor` times as large: A and scaling stay, B' = factor·B.

    A bias on B is part of the delta, and scaled too.

    The scaling stays the config's, so that the adapter can be saved and trained on.

    Args:
        adapter: As from `init_adapter`.
        factor: Any number; a negative one takes away what the adapter has learned.

    Raises:
        InputError: if the adapter holds whole modules, which have no delta.

    Example:
        >>> adapter = {"q": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 6)),
        ...                  "lora_scaling": jnp.float32(0.5)}}
        >>> scale_adapter(adapter, -3.0)["q"]["lora_B"][0, 0]
        Array(-3., dtype=float32)

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 2.
    """
    if whole := whole_parameters(adapter):
        raise InputError(
            f"scale_adapter: the adapter holds {whole[0]} whole, and its change is not known"
            " without the base; split it off with partition"
        )

    def scaled(path: str, leaf: Any) -> Any:
        if not path.endswith(("lora_B", "lora_B_bias")):
            return leaf
        # Multiplied before it is rounded to 16 bits.
        return (jnp.float32(factor) * leaf).astype(leaf.dtype)

    return map_with_path(scaled, adapter)
