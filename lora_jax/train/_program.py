"""What a run's config asks for, as one compiled step and the state before it."""

from collections.abc import Callable
from typing import Any

import jax

from .._typing import Params
from ._job import Setup
from ._optimizer import make_optimizer
from ._step import TrainState, init_state, make_step


def make_program(setup: Setup, steps: int) -> tuple[Any, Callable[[Params], TrainState]]:
    """The jitted step of a run (see `make_step`), and a function from what it trains to its state.

    Args:
        setup: The model and the config; shapes do as well as arrays.
        steps: How many steps the run takes, for the learning rate's schedule.
    """
    c = setup.config
    tx = make_optimizer(c.train, steps, setup.mask)
    step = make_step(setup.model, tx, dropout=c.lora.lora_dropout, chunk=c.train.loss_chunk)

    def init(trainable: Params) -> TrainState:
        key = jax.random.key(c.train.seed)
        return init_state(
            trainable,
            tx,
            key,
            dtype=c.model.dtype,
            offload=c.train.offload_optimizer,
            # Two copies of a whole model are one too many.
            copy=c.train.method != "full",
        )

    return step, init
