"""This program: its version, and what it is called by."""

from pathlib import Path

VERSION = "0.1.0"
_CHECKOUT = (Path(__file__).parents[1] / "lora").is_file()
PROGRAM = "./lora" if _CHECKOUT else "lora"
"""The script of a checkout, or what an installed package puts on the PATH."""
