"""Flax modules with their adapters."""

from ._contraction import contraction_of as contraction_of
from ._linen import LoraLinen as LoraLinen
from ._linen import lora_linen as lora_linen
