"""What the claims share: arms trained side by side, and held-out scores.

A claim compares *arms*.  Every arm of a comparison sees the same batches in the same order, has its
learning rate chosen by rows that are not reported, and is then trained anew for each seed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bases import Base as Base
from bases import Params as Params
from bases import Task as Task
from bases import data_path as data_path
from bases import load_base as load_base
from bases import pairs as pairs
from bases import shares as shares
from bases import texts as texts
from bases import tiny as tiny

from lora_jax import LoraConfig, combine, trainable_mask
from lora_jax.data import Examples, batch_iterator, eval_batches
from lora_jax.lora import stack_adapters, take_adapter
from lora_jax.train import TrainSection, init_joint_state, make_joint_step, make_optimizer

TUNING_SEED = 1000
"""Of the runs that choose a learning rate; the reported ones have seeds 0, 1, 2, …"""


def adapter_mask(params: Params) -> Params:
    """What of an adapter is trained."""
    return trainable_mask(params, LoraConfig())


def train_together(
    base: Base,
    task: Task,
    starts: Sequence[Params],
    rates: Sequence[float],
    seeds: Sequence[int],
    mask: Callable[[Params], Params] = adapter_mask,
    looks: Sequence[int] = (),
    look: Callable[[int, list[Params]], None] = lambda step, adapters: None,
) -> list[Params]:
    """Train adapters of the same modules in one step each; the seed orders an adapter's rows.

    Args:
        starts: Adapters before their first step, which may differ in rank and scaling.
        rates: Peak learning rate of each; it rises over 5 % of the steps and falls to a tenth.
        seeds: Two adapters with one seed see the same batches.
        mask: What may move, a function of the module's top level.
        looks: Steps after which `look` is called with the adapters as they then are.
    """

    def taken() -> list[Params]:
        return [take_adapter(state.trainable, i, start) for i, start in enumerate(starts)]

    tx, step = _program(base.model, task.steps, mask)
    state = init_joint_state(starts, tx, seeds=seeds, rates=rates)
    batches = {s: batch_iterator(task.train, **task.sizes, seed=s) for s in dict.fromkeys(seeds)}
    for at in range(1, task.steps + 1):
        own = {seed: next(rows) for seed, rows in batches.items()}
        names = [name for name in own[seeds[0]] if name != "rows"]
        batch = {name: np.stack([own[seed][name] for seed in seeds])[:, None] for name in names}
        state, _ = step(state, base.params, batch)
        if at in looks:
            look(at, taken())
    return taken()


@functools.lru_cache
def _program(model: Any, steps: int, mask: Any) -> tuple[Any, Any]:
    """The optimizer and the step, the same again for the same: it is compiled once for a shape.

    Each adapter's own learning rate multiplies the schedule's, which is therefore 1.
    """
    tx = make_optimizer(TrainSection(warmup=0.05, learning_rate=1.0), steps, mask)
    return tx, make_joint_step(model, tx, own_data=True)


@dataclasses.dataclass(frozen=True)
class Score:
    """`loss` in nats per trained token; `exact`, the share of rows whose every trained token is the
    likeliest given the true ones before it (of packed rows, no matter)."""

    loss: float
    exact: float


def score(base: Base, adapters: Sequence[Params], examples: Examples) -> list[Score]:
    """How well each adapter predicts the trained tokens of examples, each in a row of its own."""
    stacked, sums = stack_adapters(adapters), []
    length = -(-max(map(len, examples)) // 32) * 32
    for batch in eval_batches(examples, batch_size=32, seq_length=length, packing=False):
        arrays = {name: x for name, x in batch.items() if name != "rows"}
        real = (batch["loss_mask"] & (batch["segment_ids"] > 0)).any(axis=1)
        loss, count, right = jax.device_get(
            _joint_row_sums(base.model, stacked, base.params, arrays)
        )
        sums.append((loss[:, real], count[:, real], right[:, real]))
    loss, count, right = (np.concatenate(part, axis=1) for part in zip(*sums, strict=True))
    means = loss.sum(axis=1, dtype=np.float64) / count.sum(axis=1)
    return [Score(float(a), float(b)) for a, b in zip(means, right.mean(axis=1), strict=True)]


def base_score(base: Base, examples: Examples) -> Score:
    """The score of the base alone, as that of an adapter that changes nothing."""
    adapter = base.adapter(LoraConfig(r=1, target_modules="all-linear"), 0)
    return score(base, [adapter], examples)[0]


def row_sums(model: Any, adapter: Params, base: Params, batch: Params) -> tuple[Any, ...]:
    """Of each row the summed loss, the trained tokens, and whether all of them are likeliest."""
    params = {"params": combine(base, adapter)}
    hidden, _ = model.apply(
        params,
        batch["input_ids"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden_states",
    )
    logits = model.apply(params, hidden, method="logits")[:, :-1].astype(jnp.float32)
    targets, asked = batch["input_ids"][:, 1:], batch["loss_mask"][:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.where(asked, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum(axis=1)
    right = jnp.where(asked, logits.argmax(axis=-1) == targets, True).all(axis=1)
    return loss, asked.sum(axis=1), right


@jax.jit(static_argnums=0)
def _joint_row_sums(model: Any, adapters: Params, base: Params, batch: Params) -> tuple[Any, ...]:
    model = dataclasses.replace(model, module=model.module.clone(fused_attention=False))
    many = jax.vmap(lambda *x: row_sums(model, *x), in_axes=(0, None, None))
    return many(adapters, base, batch)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that is compared: an adapter's config under a name."""

    name: str
    lora: LoraConfig


def run_arms(
    base: Base,
    task: Task,
    arms: Sequence[tuple[Arm, float, int]],
    *,
    tuning: bool = False,
) -> list[dict[str, Any]]:
    """Train each `(arm, rate, seed)` and make a record of it.

    Arms of the same modules are trained in one step, all of them at one rate or seed, so that the
    same program serves again.  A record holds the score on `task.valid` when tuning, and else that
    on each part of `task.test`.
    """
    groups: dict[Any, list[int]] = {}
    for i, (arm, rate, seed) in enumerate(arms):
        alike = (str(arm.lora.target_modules), rank_bucket(arm.lora.r))
        groups.setdefault((alike, rate if tuning else seed), []).append(i)
    records: dict[int, dict[str, Any]] = {}
    for numbers in groups.values():
        begun = time.perf_counter()
        chosen, rates, seeds = zip(*(arms[i] for i in numbers), strict=True)
        starts = [base.adapter(a.lora, seed) for a, seed in zip(chosen, seeds, strict=True)]
        adapters = train_together(base, task, starts, rates, seeds)
        seconds = time.perf_counter() - begun
        named = {"valid": task.valid} if tuning else task.test
        found = {name: score(base, adapters, part) for name, part in named.items()}
        for n, i in enumerate(numbers):
            own = {name: dataclasses.asdict(scores[n]) for name, scores in found.items()}
            records[i] = {
                "task": task.name,
                "arm": chosen[n].name,
                "rate": rates[n],
                "seed": seeds[n],
                "trainable": trained(starts[n]),
                "seconds": round(seconds / len(numbers), 2),
                **own,
            }
        print(f"{task.name}: {len(records)} of {len(arms)} ({seconds:.0f} s)", flush=True)
    return [records[i] for i in range(len(arms))]


def rank_bucket(rank: int) -> int:
    """Ranks of one bucket are trained together, padded to the largest of them."""
    return 16 if rank <= 16 else 64


def trained(adapter: Params) -> int:
    """How many numbers of an adapter are trained."""
    leaves = zip(jax.tree.leaves(adapter), jax.tree.leaves(adapter_mask(adapter)), strict=True)
    return sum(x.size for x, moves in leaves if moves)


def tune_and_run(
    base: Base,
    task: Task,
    arms: Sequence[Arm],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs that chose each arm's learning rate, and those of the chosen one, by seed.

    The choice is the lowest loss on `task.valid`; a choice at an end of the grid says so (`edge`).
    """
    tries = [(a, r, TUNING_SEED) for a in arms for r in rates if len(rates) > 1]
    tried = run_arms(base, task, tries, tuning=True)
    best = {a.name: best_rate(tried, a.name) if tried else rates[0] for a in arms}
    found = run_arms(base, task, [(a, best[a.name], s) for a in arms for s in seeds])
    ends = (min(rates), max(rates))
    return tried, [record | {"edge": record["rate"] in ends} for record in found]


def compare(
    base: Base, task: Task, arms: Sequence[Arm], rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """What a task's results hold: the base's scores, how long was trained, and all runs."""
    tried, runs = tune_and_run(base, task, arms, rates, seeds)
    return {
        "before": {name: vars(base_score(base, part)) for name, part in task.test.items()},
        "steps": task.steps,
        "tokens": task.steps * task.batch_size * task.length,
        "tuning": tried,
        "runs": runs,
    }


def best_rate(tried: Sequence[Mapping[str, Any]], arm: str) -> float:
    """The learning rate of the lowest validation loss; one that diverged is never it."""
    own = [r for r in tried if r["arm"] == arm and np.isfinite(r["valid"]["loss"])]
    return min(own, key=lambda r: r["valid"]["loss"])["rate"]
