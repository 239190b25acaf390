# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What LoRA is
#
# A network that has learnt one thing is to learn another. The plain way is to go on training all of
# its weights. That works, and it is dear: for every weight the optimizer keeps two more numbers,
# the gradient is a third, and what comes out is a whole new copy of the model for every task.
#
# LoRA (*low-rank adaptation*, Hu et al. 2021) leaves the weights as they are and learns only a
# small correction to them. This notebook says what the correction is, counts it, fine-tunes a real
# (small) language model to see why so little is enough, and shows what is left of it when training
# is over: nothing that costs time.
#
# You need to know what a matrix product is, and what a gradient step does.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope

from lora_jax import (
    LoraConfig,
    combine,
    init_adapter,
    merge_adapter,
    optim,
    take_adapter,
)
from lora_jax.data import eval_batches
from lora_jax.report import plot_matrices, plot_rank_loss, plot_singular_values
from lora_jax.train import (
    evaluate,
    init_joint_state,
    init_state,
    job_batches,
    make_eval_step,
    make_joint_step,
    make_step,
    prepare,
    run_config,
)

# %% [markdown]
# ## The idea in one line
#
# A layer multiplies its input by a weight matrix, $y = xW$. Fine-tuning turns the weights $W_0$
# into $W_0 + \Delta W$. LoRA says: let $\Delta W$ be a product of two thin matrices,
#
# $$ W = W_0 + s \cdot A B, \qquad A: d_\text{in} \times r, \quad B: r \times d_\text{out}, \quad
# s = \frac{\alpha}{r}. $$
#
# The number $r$ is the **rank**: $AB$ can only move its input in $r$ directions. $W_0$ is frozen,
# $A$ and $B$ are trained. The factor $s$ (`scaling`) is fixed; it lets one change $r$ without
# looking for a new learning rate.
#
# **A word on order.** The paper, and PyTorch, write $W_0 + s \cdot BA$, because there a layer
# computes $Wx$ with $W$ of shape $(d_\text{out}, d_\text{in})$. Flax keeps kernels as
# $(d_\text{in}, d_\text{out})$ and computes $xW$, so this library writes $A$ first. It is the same
# matrix, transposed: the first factor that the input meets is called $A$ in both.

# %%
rng = np.random.default_rng(0)
W0, A, B = rng.normal(size=(24, 32)), rng.normal(size=(24, 2)), rng.normal(size=(2, 32))
scaling = 0.5
plot_matrices(
    {"W0": W0, "A": A, "B": B, "scaling·A·B": scaling * A @ B, "W": W0 + scaling * A @ B},
    title="24 × 32 weights, a correction of rank 2",
)

# %% [markdown]
# $A \cdot B$ looks like woven cloth: each of its rows is a mixture of the same two rows, those of
# $B$. That is what a low rank is.
#
# ## Counting
#
# A matrix of 1000 × 1000 holds a million numbers. With $r = 8$ the two factors hold $1000 \cdot 8 +
# 8 \cdot 1000 = 16\,000$: 1.6 % of it. `init_adapter` makes the factors for every layer that the
# config names; `jax.eval_shape` asks it for the shapes alone.

# %%
base_params = {"layer": {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}}


def adapter_of_rank(r, params=base_params):
    config = LoraConfig(r=r, lora_alpha=16, target_modules=["layer"])
    return jax.eval_shape(lambda key: init_adapter(key, params, config), jax.random.key(0))


def trainable(adapter):
    layer = adapter["layer"]
    return layer["lora_A"].size + layer["lora_B"].size


treescope.display(adapter_of_rank(8))
for r in (1, 8, 64, 500):
    count = trainable(adapter_of_rank(r))
    print(f"r = {r:3}: {count:9,} of 1,000,000 weights, {count / 1e6:.1%}")
assert trainable(adapter_of_rank(8)) == 16_000

# %% [markdown]
# The last line is a warning: at $r = 500$ the two factors hold as much as the matrix itself. LoRA
# spares something only while $r$ is far below $d_\text{in} d_\text{out} / (d_\text{in} +
# d_\text{out})$.
#
# The adapter is a **tree of its own**, beside that of the base: a nested dict with `lora_A` and
# `lora_B` where the base has `kernel`. So `jax.grad` by the adapter gives gradients of the adapter,
# and the frozen weights never get any. `lora_B` starts at zero: before the first step, the adapted
# model computes what the base does.
#
# ## Why so little is enough: a real fine-tune
#
# That a *small* change of the weights is enough seems likely; that a change *of low rank* is enough
# is a claim about nature, and can be looked at. With the library comes a language model of 3.8
# million parameters that has read Python's standard library. We fine-tune **all** of its weights to
# say in a sentence what a Python function does, and then look at what has changed.

# %%
SEQ, BATCH, STEPS = 96, 4, 40
config = run_config(
    {
        "data": {"train": "stdlib", "eval": "stdlib-heldout", "train_rows": 1000, "eval_rows": 100,
                 "template": "plain", "max_length": SEQ},
        "train": {"method": "full", "batch_size": BATCH, "loss_chunk": SEQ},
        "model": {"remat": "everything"},
        "output": "runs/not-written",
    },
    [],
    "this notebook",
)  # fmt: skip
job = prepare(config)
base, model, layouts = job.trainable, job.model, job.layouts
print(f"{job.counts()['trainable']:,} weights; {len(job.train)} rows to train on,", end=" ")
print(f"{len(job.eval)} of modules never seen")
treescope.display(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base))


# %%
def trained(step, state, frozen):
    """What is trained after `STEPS` steps; `frozen` gets no gradient."""
    batches = job_batches(job)
    for _ in range(STEPS):
        batch = {name: x[None] for name, x in next(batches).items() if name != "rows"}
        state, _ = step(state, frozen, batch)
    return state.trainable


def adam(peak):
    """Adam whose learning rate falls to zero."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(peak, 0, STEPS))
    )


eval_step = make_eval_step(model, chunk=SEQ)


def held_out(params):
    """Mean loss on rows of modules that neither the base nor the fine-tune has seen."""
    batches = eval_batches(job.eval, batch_size=BATCH, seq_length=SEQ)
    return evaluate(eval_step, params, batches).loss


full = adam(1e-3)
tuned = trained(make_step(model, full, chunk=SEQ), init_state(base, full, jax.random.key(0)), {})
before, after = held_out(base), held_out(tuned)
print(f"held-out loss {before:.3f} -> {after:.3f} nats per token, all weights trained")
assert after < before

# %% [markdown]
# ### What has changed?
#
# $\Delta W = W_\text{tuned} - W_0$ of one layer, and its *singular values*: any matrix is a sum of
# rank-1 pieces, and the singular values say how large each piece is, the largest first. If they all
# were alike, no low-rank matrix could stand for $\Delta W$. To compare: a random matrix of the same
# size and norm, and the weights $W_0$ themselves.

# %%
LAYER, NAME = 1, "q_proj"


def kernel(params, name=NAME, layer=LAYER):
    return np.asarray(params["model"]["layers"]["self_attn"][name]["kernel"][layer], np.float64)


W0 = kernel(base)
delta = kernel(tuned) - W0
noise = rng.normal(size=delta.shape)
noise *= np.linalg.norm(delta) / np.linalg.norm(noise)
values = {
    "W0": np.linalg.svd(W0, compute_uv=False),
    "ΔW of the fine-tune": np.linalg.svd(delta, compute_uv=False),
    "noise of the norm of ΔW": np.linalg.svd(noise, compute_uv=False),
}
plot_singular_values(values, title=f"{NAME} of layer {LAYER}, {W0.shape[0]} × {W0.shape[1]}")

# %%
for name, s in values.items():
    share = np.cumsum(s**2) / np.sum(s**2)
    print(f"{name:25} the first 4 of {len(s)} hold {share[3]:4.0%} of the squared norm,", end=" ")
    print(f"90 % take {np.searchsorted(share, 0.9) + 1}")

# %% [markdown]
# The curve of $\Delta W$ falls steeply where that of noise is nearly flat: a few directions carry
# much of the change. Not all of it! There is a long tail. The question is whether the tail
# *matters*.
#
# ## Rank against loss
#
# Two ways to ask:
#
# 1. **Cut.** Keep the first $r$ directions of every $\Delta W$ of the full fine-tune and throw away
#    the rest (and leave embedding and norms as they were).
# 2. **Train.** Never train more than $r$ directions: LoRA.

# %%
RANKS = (1, 2, 4, 8, 16, 64)


def directions(path, new, old):
    """U, S and Vᵀ of what has changed in a stack of kernels; None for any other parameter."""
    if path[-1].key != "kernel":
        return None
    return np.linalg.svd(np.asarray(new - old), full_matrices=False)


changes = jax.tree_util.tree_map_with_path(directions, tuned, base)


def with_directions(r):
    """The base, moved along the first `r` directions of each kernel's change."""

    def leaf(weight, change):
        if change is None:
            return weight
        u, s, vt = change
        return weight + (u[..., :r] * s[..., None, :r]) @ vt[..., :r, :]

    return jax.tree.map(leaf, base, changes)


cut_losses = {r: held_out(with_directions(r)) for r in RANKS}
print({r: round(loss, 3) for r, loss in cut_losses.items()})

# %% [markdown]
# Cutting at rank $r$ is what the library's `extract_adapter` does: it makes an adapter of two
# checkpoints. For the second question, `make_joint_step` trains several adapters over one base in
# one step, each as it would be trained alone. `freeze_base` keeps the optimizer to what is trained
# of an adapter: the two factors, and not the scaling that stands beside them.

# %%
TRAINED_RANKS = (1, 8)


def lora_config(r):
    return LoraConfig(r=r, lora_alpha=r, target_modules="all-linear")


adapters = [
    init_adapter(jax.random.key(r), base, lora_config(r), layouts=layouts) for r in TRAINED_RANKS
]
tx = optim.freeze_base(adam(3e-3))
together = trained(
    make_joint_step(model, tx, chunk=SEQ),
    init_joint_state(adapters, tx, seeds=[0] * len(adapters), rates=[1.0] * len(adapters)),
    base,
)
adapters = [take_adapter(together, i, adapter) for i, adapter in enumerate(adapters)]
trained_losses = {
    r: held_out(combine(base, adapter)) for r, adapter in zip(TRAINED_RANKS, adapters, strict=True)
}
print({r: round(loss, 3) for r, loss in trained_losses.items()})

# %%
plot_rank_loss(
    {"full fine-tune, cut to r": cut_losses, "LoRA, trained at r": trained_losses},
    levels={"before": before, "all weights trained": after},
    title="a handful of directions is the whole fine-tune",
)

# %%
assert min(cut_losses.values()) < after + 0.05  # what was cut away was not needed
assert trained_losses[8] < before - 0.6 * (before - after)  # and LoRA finds such directions itself

# %% [markdown]
# Read it from the left. One direction in each matrix already does most of the work, four do all of
# it; the long tail of singular values was wandering, not learning. And LoRA, which could never use
# more than its $r$ directions, does no worse than the full fine-tune: here it even does better, on
# rows that neither has seen. (Do not make a law of that. The two learn at different rates, of which
# neither was searched for, and LoRA leaves embedding and head alone.)
#
# This is one small model and one task. Where much has to be learnt that the base has no idea of,
# another language, say, more rank is needed; the experiment is the same.
#
# ## Merging: nothing is left at run time
#
# While it trains, an adapted layer computes $xW_0 + s \cdot (xA)B$: one large product and two thin
# ones. Afterwards the correction can be added to the weights once and for all. `merge_adapter`
# gives a plain tree for the plain model, of the base's own shapes: not a single operation more than
# before.

# %%
adapter = adapters[TRAINED_RANKS.index(8)]
merged = merge_adapter(base, adapter, layouts=layouts)
module, ids = job.pretrained.module, jnp.zeros((1, SEQ), jnp.int32)


def flops(apply, params):
    return jax.jit(apply).lower({"params": params}, ids).compile().cost_analysis()["flops"]


plain = flops(module.apply, base)
adapted = flops(model.apply, combine(base, adapter))
after_merge = flops(module.apply, merged)
print(f"operations of one pass: base 1, with an adapter of rank 8 {adapted / plain:.3f},", end=" ")
print(f"merged {after_merge / plain:.3f}")

beside = jax.jit(model.apply)({"params": combine(base, adapter)}, ids)
inside = jax.jit(module.apply)({"params": merged}, ids)
difference = float(jnp.abs(beside - inside).max() / jnp.abs(beside).max())
print(f"largest difference of the logits: {difference:.0e} of the largest logit")
assert after_merge == plain < adapted
assert difference < 1e-4

# %% [markdown]
# `unmerge_adapter` takes it out again. Or do not merge, keep one base and many small adapters, and
# choose one for every request: that is the notebook `many_adapters`.
#
# ## To remember
#
# - $W = W_0 + s \cdot AB$: the base is frozen, two thin factors are trained.
# - $r (d_\text{in} + d_\text{out})$ numbers in place of $d_\text{in} d_\text{out}$.
# - Fine-tuning *does* change weights in all directions; what *counts* of it lies in a few.
# - Merged, it costs nothing; apart, it is a file of a few megabytes.
#
# To try: another `LAYER` and `NAME` (`v_proj`, `o_proj`); ten times the `STEPS`; a learning rate of
# 3e-2 for LoRA. What happens to the curve if only `["q_proj", "v_proj"]` are adapted?
#
# Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Aghajanyan et al. 2020,
# "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning".
