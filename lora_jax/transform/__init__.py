"""Flax modules with their adapters."""

from ._contraction import contraction_of as contraction_of
from ._linen import LoraLinen as LoraLinen
from ._linen import lora_linen as lora_linen
from ._nnx import LoraConstant as LoraConstant
from ._nnx import LoraVariable as LoraVariable
from ._nnx import lora_nnx as lora_nnx
from ._nnx import nnx_adapter as nnx_adapter
from ._nnx import nnx_layouts as nnx_layouts
from ._nnx import nnx_params as nnx_params
from ._nnx import with_nnx_params as with_nnx_params
