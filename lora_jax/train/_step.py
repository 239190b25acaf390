"""One training step: a pure, jitted, donated function of state, base and batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._tree import combine, leaves_with_path
from .._typing import Array, Key, Params
from ..lora import with_dropout
from ..optim._offload import on_host, to_device, to_host, to_space_of
from ..transform import LoraLinen
from ._loss import as_float32, next_token_loss

GROW_AFTER = 200
"""Good steps after which the loss scale of float16 doubles."""
FIRST_SCALE, HIGHEST_SCALE = 2.0**15, 2.0**24
LOWEST_SCALE = 2.0
"""A step that overflows even at this scale is no matter of the scale."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    `trainable` is the adapter (or, in full training, all parameters); `key` makes dropout's
    randomness; `loss_scale` is 1, and stays so, unless float16 takes part.
    """

    # Arrays, or only their shapes where a step is compiled and not run.
    step: Any
    trainable: Any
    opt_state: Any
    key: Any
    loss_scale: Any
    good_steps: Any


def init_state(
    trainable: Params,
    tx: optax.GradientTransformation,
    key: Key,
    *,
    dtype: Any = jnp.float32,
    offload: bool = False,
    copy: bool = True,
) -> TrainState:
    """A state before its first step; it owns copies of the arrays, since steps donate it.

    Args:
        trainable: The adapter, or all parameters.
        tx: The optimizer.
        key: Random key, for dropout.
        dtype: Type of the activations; float16 here or in `trainable` means loss scaling.
        offload: Keep the optimizer's state in host memory between updates.
        copy: False takes the arrays themselves, which the first step then uses up.
    """
    trainable = jax.tree.map(jnp.array if copy else jnp.asarray, trainable)
    dtypes = {jnp.dtype(dtype)} | {leaf.dtype for _, leaf in leaves_with_path(trainable)}
    opt_state = tx.init(as_float32(trainable))
    scale = FIRST_SCALE if jnp.dtype(jnp.float16) in dtypes else 1.0
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=to_host(opt_state) if offload else opt_state,
        key=key,
        loss_scale=jnp.asarray(scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
    )
    # What a step with arrays in host memory returns is tied to its device.  If what it takes
    # were not, it would compile once more for its second call.
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), state) if offload else state


def batch_loss(model: LoraLinen, params: Params, batch: Params, chunk: int) -> tuple[Array, Array]:
    """Summed loss and number of trained tokens of one batch, for any tree of parameters."""
    hidden, _ = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden_states",
    )

    def head(states: Array) -> Array:
        return model.apply({"params": params}, states, method="logits")

    return next_token_loss(head, hidden, batch["input_ids"], batch["loss_mask"], chunk=chunk)


Step = Callable[[TrainState, Params, Params], tuple[TrainState, dict[str, Array]]]
"""`(state, base_params, batches) -> (state, metrics)`."""


def make_step(
    model: LoraLinen,
    tx: optax.GradientTransformation,
    *,
    dropout: float = 0.0,
    chunk: int = 1024,
    mesh: Any = None,
    shardings: Any = None,
) -> Step:
    """The jitted step `(state, base_params, batches) -> (state, metrics)`.

    The gradient is that of the mean loss per trained token over all batches of the step.
    A step whose loss, gradient or update is not finite changes nothing and says so in its
    metrics.  The optimizer's state stays in the memory, device or host, that it is given in.

    Args:
        model: From `lora_linen`; its module has `hidden_states` and `logits`.
        tx: The optimizer, over the trainable tree.
        dropout: Rate on the adapter's inputs.
        chunk: Tokens whose logits exist at one time.
        mesh: The devices that it runs on, if there are several.
        shardings: How the state is cut over them, before a step and after it.

    Returns:
        The step.  `batches` holds arrays (accumulate, batch, seq); metrics are scalars on the
        device: `loss` (nats per token), `tokens` (trained), `read` (all but padding),
        `grad_norm`, `finite`, `loss_scale`.
    """
    # Results begin with what is donated, in its order: JAX pairs the two by shape alone, and must
    # not pair arrays in host memory with results on the device.
    step = on_mesh(mesh, step_function(model, tx, dropout=dropout, chunk=chunk))
    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def on_mesh(mesh: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, to be traced, whose layers know the mesh that it is compiled for."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def step_function(
    model: LoraLinen, tx: optax.GradientTransformation, *, dropout: float, chunk: int
) -> Step:
    """What `make_step` compiles."""

    def loss_of_batch(trainable: Params, base: Params, batch: Params, key: Key, weight: Array):
        adapter = with_dropout(key, trainable, dropout)
        total, _ = batch_loss(model, combine(base, adapter), batch, chunk)
        return total * weight, total

    def summed(trainable: Params, base: Params, batches: Params, key: Key, weight: Array):
        """Loss and weighted float32 gradient, summed over the batches of a step."""

        def body(carry: Any, part: Any) -> tuple[Any, None]:
            batch, key = part
            grads, total = jax.grad(loss_of_batch, has_aux=True)(
                trainable, base, batch, key, weight
            )
            return jax.tree.map(jnp.add, carry, (total, as_float32(grads))), None

        first = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, as_float32(trainable)))
        keys = jax.random.split(key, len(batches["input_ids"]))
        return jax.lax.scan(body, first, (batches, keys))[0]

    def step(state: TrainState, base: Params, batches: Params):
        key = jax.random.fold_in(state.key, state.step)
        tokens = jnp.sum(batches["loss_mask"][..., 1:])
        per_token = 1.0 / jnp.maximum(tokens, 1)
        # The mean is taken before the backward pass: float16 would overflow in a gradient of sums.
        weight = per_token * state.loss_scale
        total, grads = summed(state.trainable, base, batches, key, weight)
        grads = jax.tree.map(lambda g: g / state.loss_scale, grads)
        norm = optax.tree.norm(grads)
        held = to_device(state.opt_state) if on_host(state.opt_state) else state.opt_state
        updates, opt_state = tx.update(grads, held, as_float32(state.trainable))
        finite = jnp.isfinite(total + norm + optax.tree.norm(updates))
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": total * per_token,
            "tokens": tokens,
            "read": jnp.count_nonzero(batches["segment_ids"]),
            "grad_norm": norm,
            "finite": finite,
            "loss_scale": jnp.copy(state.loss_scale),
        }
        state = TrainState(
            step=state.step + 1,
            trainable=_choose(finite, trainable, state.trainable),
            opt_state=to_space_of(_choose(finite, opt_state, held), state.opt_state),
            key=state.key,
            **_next_scale(state, finite),
        )
        return state, metrics

    return step


def _next_scale(state: TrainState, finite: Array) -> dict[str, Array]:
    """Halve the loss scale after an overflow, double it after many good steps."""
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= GROW_AFTER
    grown = jnp.minimum(jnp.where(grow, state.loss_scale * 2, state.loss_scale), HIGHEST_SCALE)
    scale = jnp.where(finite, grown, jnp.maximum(state.loss_scale / 2, LOWEST_SCALE))
    # A scale of exactly 1, which halving never reaches, means that nothing is float16.
    scale = jnp.where(state.loss_scale == 1.0, 1.0, scale)
    return {"loss_scale": scale, "good_steps": jnp.where(grow, 0, good)}


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
