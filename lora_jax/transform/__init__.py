"""Flax modules with their adapters."""

from ._linen import LoraLinen as LoraLinen
from ._linen import lora_linen as lora_linen
