"""`python -m lora_jax`, and what an installed package calls `lora`: the command line."""

import signal

# Ctrl-C ends in silence what has hardly begun.
before = signal.getsignal(signal.SIGINT)
if before is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .cli import main  # noqa: E402

signal.signal(signal.SIGINT, before)

if __name__ == "__main__":
    main()
