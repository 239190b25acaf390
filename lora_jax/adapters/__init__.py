"""Adapters on disk, in PEFT's format."""

from ._load import load_adapter as load_adapter
from ._peft import read_config as read_config
from ._save import save_adapter as save_adapter
