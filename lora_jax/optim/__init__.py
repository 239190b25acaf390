"""Optimizers for adapters, as optax transformations."""

from ._adam_8bit import adam_8bit as adam_8bit
from ._adam_8bit import scale_by_adam_8bit as scale_by_adam_8bit
from ._freeze import freeze_base as freeze_base
from ._offload import offload_state as offload_state
