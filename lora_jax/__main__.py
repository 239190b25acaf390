"""`python -m lora_jax` is the command line."""

from .cli import main

main()
