"""Optimizers for adapters, as optax transformations."""

from ._adam_8bit import adam_8bit as adam_8bit
from ._adam_8bit import scale_by_adam_8bit as scale_by_adam_8bit
from ._freeze import freeze_base as freeze_base
from ._lora_fa import lora_fa as lora_fa
from ._lora_fa import scale_by_lora_fa as scale_by_lora_fa
from ._lora_plus import lora_plus as lora_plus
from ._lora_plus import scale_lora_b as scale_lora_b
from ._offload import offload_state as offload_state
from ._riemannian import riemannian as riemannian
from ._riemannian import scale_by_riemannian as scale_by_riemannian
