"""Aliases for arrays and parameter trees."""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
Key = jax.Array
Params = Mapping[str, Any]
"""A nested mapping from module and parameter names to arrays (or quantized tensors)."""
