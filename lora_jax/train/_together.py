"""Several adapters trained in one step over one frozen base."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._errors import InputError
from .._tree import combine
from .._typing import Array, Params
from ..data import eval_batches
from ..lora import stack_adapters, take_adapter
from ..models import CausalLM
from ..transform import LoraLinen
from ._evaluate import Evaluation, mean_loss
from ._job import Job
from ._loop import job_batches, steps_of
from ._optimizer import make_optimizer
from ._step import Step, TrainState, batch_loss, init_state, step_function


class OwnRate(NamedTuple):
    """The state of `scale_by_own_rate`."""

    rate: Array


def scale_by_own_rate(rate: Array | float) -> optax.GradientTransformation:
    """Multiply updates by a number that is kept in the state, not in the program.

    So one compiled step serves adapters of several learning rates.

    Example:
        >>> tx = scale_by_own_rate(0.5)
        >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.zeros(2)}))
        >>> updates["w"].tolist()
        [0.5, 0.5]
    """

    def init(params: Any) -> OwnRate:
        del params
        return OwnRate(jnp.asarray(rate, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OwnRate]:
        del params
        return jax.tree.map(lambda u: (state.rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def make_joint_step(
    model: LoraLinen,
    tx: optax.GradientTransformation,
    *,
    dropout: float = 0.0,
    chunk: int = 1024,
    own_data: bool = False,
) -> Step:
    """`make_step` for several adapters over one base, of which there is no copy.

    Each adapter has its own gradient, clipping, optimizer state, learning rate and randomness,
    and moves as it would alone.

    Args:
        model, tx, dropout, chunk: As for `make_step`.
        own_data: Whether each adapter has batches of its own, along a new first axis; else all
            learn from the same.

    Returns:
        The step over a state from `init_joint_state`; its metrics hold a number for each adapter.

    Example:
        >>> from lora_jax import KernelLayout, LoraConfig, init_adapter, lora_linen, optim
        >>> from lora_jax.models import CausalLM, ModelConfig
        >>> shape = ModelConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...                     num_hidden_layers=1, num_attention_heads=2)
        >>> ids = jnp.ones((1, 4), jnp.int32)
        >>> base = CausalLM(shape).init(jax.random.key(0), ids)["params"]
        >>> config = LoraConfig(r=2, target_modules=["down_proj"])
        >>> layouts = {"model/layers": KernelLayout(stack="model/layers")}
        >>> adapters = [init_adapter(jax.random.key(i), base, config, layouts=layouts)
        ...             for i in range(3)]
        >>> tx = optim.freeze_base(optax.sgd(1.0))
        >>> step = make_joint_step(lora_linen(CausalLM(shape)), tx)
        >>> state = init_joint_state(adapters, tx, seeds=[0, 1, 2], rates=[0.1, 0.2, 0.3])
        >>> batch = {name: ids[None] for name in ("input_ids", "positions", "segment_ids")}
        >>> state, metrics = step(state, base, batch | {"loss_mask": ids[None] == 1})
        >>> metrics["loss"].shape
        (3,)
    """
    own = _for_vmap(model)
    step = step_function(own, _with_own_rate(tx, 1.0), dropout=dropout, chunk=chunk)
    many = jax.vmap(step, in_axes=(0, None, 0 if own_data else None))
    return jax.jit(many, donate_argnums=0)


def init_joint_state(
    adapters: Sequence[Params],
    tx: optax.GradientTransformation,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    rank: int | None = None,
    dtype: Any = jnp.float32,
) -> TrainState:
    """The state of several adapters before their first step.

    Args:
        adapters: Of the same modules; ranks and scalings may differ.
        tx: The optimizer, whose updates have to be proportional to its learning rate.
        seeds: Of each one's dropout.
        rates: What each one's updates are multiplied by.
        rank: What all are padded to; the largest rank by default.
        dtype: Type of the activations.

    Raises:
        InputError: if the adapters do not go together, or the lists differ in length.
    """
    if not len(adapters) == len(seeds) == len(rates):
        raise InputError(
            f"init_joint_state: {len(adapters)} adapters, {len(seeds)} seeds and {len(rates)} rates"
            " have to be equally many"
        )

    def init(adapter: Params, key: Any, rate: Array) -> TrainState:
        return init_state(adapter, _with_own_rate(tx, rate), key, dtype=dtype)

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return jax.vmap(init)(stack_adapters(adapters, rank), keys, jnp.asarray(rates, jnp.float32))


def _for_vmap(model: LoraLinen) -> LoraLinen:
    """The model without what `jax.vmap` cannot turn into one program for all."""
    if not isinstance(model.module, CausalLM):
        return model
    return dataclasses.replace(model, module=model.module.clone(fused_attention=False))


def _with_own_rate(tx: optax.GradientTransformation, rate: Any) -> optax.GradientTransformation:
    return optax.chain(tx, scale_by_own_rate(rate))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one of several adapters came to: `before` and `after` are held-out losses."""

    before: Evaluation
    after: Evaluation
    adapter: dict[str, Any]
    steps: int
    """At which the kept weights were reached."""
    looks: tuple[tuple[int, float], ...]
    """Held-out losses by step; not a number once it has diverged."""


def train_together(
    jobs: Sequence[Job],
    *,
    stop: threading.Event | None = None,
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> list[Outcome]:
    """Train the adapters of several jobs in one step each, as each would be trained alone.

    Args:
        jobs: Over one base and the same rows; ranks, alphas, learning rates and seeds may differ.
            Where seeds do, so does the order of the rows.
        stop: Set by whoever wants it to end after the step it is at.
        listener: Called with `{"step", "steps"}` after every step.

    Returns:
        For every job, what came of it; with `train.patience`, its best weights.

    Raises:
        InputError: if it is stopped, or the config asks for `offload_optimizer`.
    """
    if jobs[0].config.train.offload_optimizer:
        raise InputError(
            "train.offload_optimizer: adapters that are trained together keep their optimizers'"
            " states on the device; leave it out"
        )
    loop = _Together(jobs)
    loop.look(0)
    for at in range(1, loop.steps + 1):
        loop.advance()
        every = jobs[0].config.train.eval_every
        if at == loop.steps or (every is not None and at % every == 0):
            loop.look(at)
            if loop.all_stopped:
                break
        if listener is not None:
            listener({"step": at, "steps": loop.steps})
        if stop is not None and stop.is_set():
            raise InputError(f"stopped at step {at} of {loop.steps}")
    return loop.outcomes()


class _Together:
    """The compiled functions and the state of jobs that are trained together."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.config = jobs, jobs[0].config
        c = self.config.train
        seeds = [job.config.train.seed for job in jobs]
        self.own_data = len(set(seeds)) > 1
        self.batches = [job_batches(job) for job in (jobs if self.own_data else jobs[:1])]
        self.steps = steps_of(self.config, self.batches[0])
        tx = make_optimizer(c, self.steps, jobs[0].mask)
        dropout = self.config.lora.lora_dropout
        self.step = make_joint_step(
            jobs[0].model, tx, dropout=dropout, chunk=c.loss_chunk, own_data=self.own_data
        )
        self.state = init_joint_state(
            [job.trainable for job in jobs],
            tx,
            seeds=seeds,
            rates=[job.config.train.learning_rate / c.learning_rate for job in jobs],
            dtype=self.config.model.dtype,
        )
        self.losses = _joint_losses(jobs[0].model, c.loss_chunk)
        self.kept = jax.tree.map(jnp.copy, self.state.trainable)
        self.looks: list[tuple[int, list[Evaluation]]] = []
        self.best = [(0, Evaluation(math.inf, 0))] * len(jobs)
        self.since_best = np.zeros(len(jobs), int)

    def advance(self) -> None:
        """One step of all."""
        several = [self._batch(batches) for batches in self.batches]
        batch = several[0]
        if self.own_data:
            batch = {name: np.stack([own[name] for own in several]) for name in batch}
        self.state, _ = self.step(self.state, self.jobs[0].base, batch)

    def _batch(self, batches: Any) -> dict[str, np.ndarray]:
        parts = [next(batches) for _ in range(self.config.train.accumulate)]
        return {name: np.stack([p[name] for p in parts]) for name in parts[0] if name != "rows"}

    def look(self, at: int) -> None:
        """Measure the held-out losses, and keep what is better or, without patience, the last."""
        found = self._measure()
        self.looks.append((at, found))
        patience = self.config.train.patience
        if at == 0:
            return
        better = (
            np.array(
                [
                    patience is None or new.loss < old.loss
                    for new, (_, old) in zip(found, self.best, strict=True)
                ]
            )
            & ~self.stopped
        )
        self.since_best = np.where(better, 0, self.since_best + 1)
        self.best = [
            (at, new) if take else old
            for take, new, old in zip(better, found, self.best, strict=True)
        ]
        take = jnp.asarray(better)
        self.kept = jax.tree.map(functools.partial(_where, take), self.state.trainable, self.kept)

    @property
    def stopped(self) -> np.ndarray:
        """Which of them a run of its own would have ended by now."""
        patience = self.config.train.patience
        never = np.zeros(len(self.jobs), bool)
        return never if patience is None else self.since_best >= patience

    @property
    def all_stopped(self) -> bool:
        return bool(self.stopped.all())

    def _measure(self) -> list[Evaluation]:
        c, job = self.config, self.jobs[0]
        batches = eval_batches(
            job.eval,
            batch_size=c.train.batch_size,
            seq_length=c.data.seq_length,
            packing=c.data.packing,
            pad_id=job.pretrained.tokenizer.pad_id or 0,
        )
        sums = [
            self.losses(self.state.trainable, job.base, {k: v for k, v in b.items() if k != "rows"})
            for b in batches
        ]
        per_adapter = zip(*(zip(*jax.device_get(own), strict=True) for own in sums), strict=True)
        return [mean_loss(own) for own in per_adapter]

    def outcomes(self) -> list[Outcome]:
        return [
            Outcome(
                before=self.looks[0][1][i],
                after=self.best[i][1],
                adapter=take_adapter(self.kept, i, job.trainable),
                steps=self.best[i][0],
                looks=tuple((at, found[i].loss) for at, found in self.looks),
            )
            for i, job in enumerate(self.jobs)
        ]


def _where(take: Array, new: Array, old: Array) -> Array:
    return jnp.where(take.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _joint_losses(
    model: LoraLinen, chunk: int
) -> Callable[[Params, Params, Mapping[str, Any]], tuple[Array, Array]]:
    """The jitted `(adapters, base, batch) -> (summed loss of each, trained tokens)`."""

    def losses(adapter: Params, base: Params, batch: Params) -> tuple[Array, Array]:
        return batch_loss(own, combine(base, adapter), batch, chunk)

    own = _for_vmap(model)
    return jax.jit(jax.vmap(losses, in_axes=(0, None, None)))
