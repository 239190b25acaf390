"""Optimizers for adapters, as optax transformations."""

from ._freeze import freeze_base as freeze_base
