"""What a run's config asks for, as one compiled step and the state before it."""

import functools
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
    c, cut = setup.config, setup.partition
    tx = make_optimizer(c.train, steps, setup.mask)
    # Two copies of a whole model are one too many.
    copy = c.train.method != "full"

    def init(trainable: Params, offload: bool) -> TrainState:
        key = jax.random.key(c.train.seed)
        return init_state(trainable, tx, key, dtype=c.model.dtype, offload=offload, copy=copy)

    make = functools.partial(make_step, setup.model, tx, dropout=c.lora.lora_dropout)
    make = functools.partial(make, chunk=c.train.loss_chunk)
    if cut is None:
        return make(), functools.partial(init, offload=c.train.offload_optimizer)
    here = functools.partial(init, offload=False)
    shapes = jax.eval_shape(here, setup.trainable)
    shardings = cut.state(shapes, offload=c.train.offload_optimizer)
    donated = () if copy else (0,)
    return make(mesh=cut.mesh, shardings=shardings), jax.jit(
        here, out_shardings=shardings, donate_argnums=donated
    )
