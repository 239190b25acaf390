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
# # Four bits
#
# The weights of a model are most of what it takes in memory: 16 bits each, as they are usually
# kept. With an adapter they are frozen, and what is frozen need not be exact: QLoRA (Dettmers et
# al. 2023) keeps them in **four bits**, so that a quarter of the memory is enough, and trains an
# adapter over them.
#
# Four bits are sixteen values. This notebook shows which sixteen, what rounding to them does to
# weights, what the blocks and the "double quantization" are for, and how an adapter makes good what
# was lost.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope

from lora_jax import (
    LoraConfig,
    QuantConfig,
    combine,
    dequantize,
    init_adapter,
    init_loftq,
    optim,
    quantize,
)
from lora_jax.data import eval_batches
from lora_jax.models import quantize_params
from lora_jax.quant import quantization_error
from lora_jax.report import (
    plot_block_sizes,
    plot_codebook,
    plot_losses,
    plot_matrices,
    plot_quantization_error,
)
from lora_jax.train import (
    evaluate,
    init_state,
    job_batches,
    make_eval_step,
    make_step,
    prepare,
    run_config,
)

# %% [markdown]
# ## Rounding to sixteen values
#
# A code of four bits is a number from 0 to 15: the place of a value in a list, the *codebook*,
# whose values lie between -1 and 1. Weights do not, so they are divided by the largest among them,
# the *absmax*, which is kept beside the codes:
#
# $$ \text{code} = \text{nearest value to } w / \text{absmax}, \qquad
# \hat w = \text{value}[\text{code}] \cdot \text{absmax} . $$
#
# Here are eight by eight weights, what is left of them, and the error.

# %%
few = jax.random.normal(jax.random.key(0), (8, 8))
rounded = dequantize(quantize(few))
plot_matrices({"weights": few, "in four bits": rounded, "error": rounded - few})

# %% [markdown]
# The one absmax of every column is the point to watch. One large weight makes the steps between
# values large for all others. So an absmax is shared by few weights only, a **block** of 64 along a
# column by default.
#
# `quantize` gives a `QuantizedTensor`: the codes, two to a byte, and the absmax values. It takes
# the kernel's place in the tree, and every layer reads it.

# %%
weight = jax.random.normal(jax.random.key(1), (256, 256))
treescope.display(quantize(weight))

# %% [markdown]
# ## Which sixteen?
#
# The obvious choice is sixteen values at even distances (`int4`). But weights are not evenly
# spread: most are near zero, few are large. **NF4** puts its values where the weights are: close
# together near zero, far apart at the ends, so that for normally distributed weights each value is
# used about equally often. `fp4` is a floating-point number of four bits: a sign, and magnitudes
# that grow.
#
# We can read a codebook off by quantizing a ramp. And we want to see it over real weights: those of
# the language model of 3.8 million parameters that comes with the library.

# %%
SEQ, BATCH, STEPS = 96, 4, 24
config = run_config(
    {
        "data": {"train": "stdlib", "eval": "stdlib-heldout", "train_rows": 600, "eval_rows": 60,
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
layers = base["model"]["layers"]
real = {
    "q_proj": layers["self_attn"]["q_proj"]["kernel"][0],
    "down_proj": layers["mlp"]["down_proj"]["kernel"][0],
}


# %%
def codebook(format):
    """The values that a format has, read off a ramp through [-1, 1]."""
    ramp = jnp.linspace(-1, 1, 4096)[:, None]
    config = QuantConfig(format, block_size=4096, double_quant=False)
    return np.unique(np.asarray(dequantize(quantize(ramp, config))))


def over_absmax(weight, block=64):
    """Weights over the largest of their block."""
    blocks = np.asarray(weight, np.float32).reshape(-1, block, weight.shape[1])
    return (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()


books = {format: codebook(format) for format in ("int4", "fp4", "nf4")}
assert len(books["nf4"]) == len(books["int4"]) == 16  # fp4 has a zero and a minus zero
plot_codebook(books, over_absmax(real["q_proj"]), title="q_proj of layer 0, in blocks of 64")

# %% [markdown]
# How often is each value of NF4 used, and how often each of sixteen even ones? A value that is
# hardly ever used is a waste of a code. The *entropy* says how many bits the codes really carry.


# %%
def entropy(format, weight):
    q = quantize(weight, QuantConfig(format))
    counts = np.unique(np.concatenate([np.asarray(q.codes >> 4), np.asarray(q.codes & 15)]),
                       return_counts=True)[1]  # fmt: skip
    shares = counts / counts.sum()
    return -np.sum(shares * np.log2(shares))


for format in books:
    print(f"{format}: {entropy(format, real['q_proj']):.2f} of 4 bits")
assert entropy("nf4", real["q_proj"]) > entropy("int4", real["q_proj"])

# %% [markdown]
# ## The error
#
# Its measure: the root of the mean squared error, as a share of that of the weights. For numbers
# drawn from a normal distribution, from one with heavy tails (a *t* distribution of three degrees
# of freedom), and for real weights.

# %%
formats = {
    "int4": QuantConfig("int4"),
    "int4, zero point": QuantConfig("int4", zero_point=True),
    "fp4": QuantConfig("fp4"),
    "nf4": QuantConfig("nf4"),
    "int8": QuantConfig("int8"),
}
kinds = {
    "normal": weight,
    "heavy tails": jax.random.t(jax.random.key(2), 3.0, (256, 256)),
    "q_proj": real["q_proj"],
    "down_proj": real["down_proj"],
}
errors = {
    name: {kind: float(quantization_error(w, own).rms) for kind, w in kinds.items()}
    for name, own in formats.items()
}
plot_quantization_error(errors, title="blocks of 64")

# %%
assert all(errors["nf4"][kind] < errors["int4"][kind] for kind in kinds)

# %% [markdown]
# Real weights lie close to the normal ones, which is what NF4 counts on. Its rival is not `int4` as
# it stands but `int4` with a *zero point*: sixteen even values from the smallest to the largest
# weight of the block, wherever those lie. It comes as near, for one more number per block (an
# eighth of a bit for every weight).
#
# Nine per cent for each weight sounds like a lot. But the errors are independent of each other, and
# a layer adds hundreds of them up, so most cancel. What it does to a whole model comes below.
#
# ## Blocks, and double quantization
#
# The smaller the block, the smaller the error, and the more absmax values there are to keep: in
# float32 each costs $32 / \text{block}$ bits for every weight. **Double quantization** keeps the
# absmax values themselves in eight bits.


# %%
def bits_and_error(block, double):
    config = QuantConfig("nf4", block_size=block, double_quant=double)
    bits = 8 * quantize(long, config).nbytes / long.size
    return bits, float(quantization_error(long, config).rms)


long = jax.random.normal(jax.random.key(3), (1024, 256))
sizes = (32, 64, 128, 256, 1024)
trade = {
    name: {size: bits_and_error(size, double) for size in sizes}
    for name, double in (("absmax in float32", False), ("absmax in 8 bits", True))
}
plot_block_sizes(trade, title="NF4, by block size; normal weights")

# %%
plain, double = trade["absmax in float32"][64], trade["absmax in 8 bits"][64]
print(f"blocks of 64: {plain[0]:.3f} bits and an error of {plain[1]:.2%};", end=" ")
print(f"double quantization {double[0]:.3f} bits and {double[1]:.2%}")
assert double[0] < 4.14 and double[1] < 1.01 * plain[1]

# %% [markdown]
# Double quantization moves every point to the left and hardly any of them up: nearly free. Blocks
# of 64 with it cost 4.13 bits, QLoRA's choice and this library's default.
#
# ## What an adapter makes good
#
# The error $E = W - \hat W$ is itself a matrix, and an adapter is a correction of low rank. Two
# ways:
#
# **Before training: LoftQ** (Li et al. 2023) lets the adapter start as the nearest matrix of rank
# $r$ to $E$. Rounding errors are like noise, and noise has no few directions that matter: do not
# expect much of it at small ranks.

# %%
kernel = {"layer": {"kernel": real["q_proj"]}}


def left_over(r):
    """The error that is left beside an adapter of rank r."""
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights="loftq")
    quantized, adapter = init_loftq(kernel, config, QuantConfig())
    a, b = adapter["layer"]["lora_A"], adapter["layer"]["lora_B"]
    error = dequantize(quantized["layer"]["kernel"]) + a @ b - real["q_proj"]
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(real["q_proj"]))


without = float(quantization_error(real["q_proj"], QuantConfig()).rms)
left = {r: left_over(r) for r in (4, 16, 128)}
print(f"without an adapter {without:.1%};", {r: f"{x:.1%}" for r, x in left.items()})
assert left[128] < left[16] < without

# %% [markdown]
# **By training.** The error of the *weights* is not what we mind; that of the *answers* is. An
# adapter that is trained anyway learns its task, and what the rounding took away, in one go. Two
# runs, alike but for the base: one over the dense weights, one over NF4.

# %%
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
bases = {"over dense weights": base, "over NF4": quantize_params(base, QuantConfig("nf4"))}
eval_step = make_eval_step(model, chunk=SEQ)
tx = optim.freeze_base(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(3e-3, 0, STEPS)))
)
step = make_step(model, tx, chunk=SEQ)


def held_out(params):
    """Mean loss on functions of modules that nobody here has read."""
    batches = eval_batches(job.eval, batch_size=BATCH, seq_length=SEQ)
    return evaluate(eval_step, params, batches).loss


def trained(frozen):
    """Held-out losses of an adapter over a base, by step."""
    adapter = init_adapter(jax.random.key(0), base, lora, layouts=layouts)
    state, batches = init_state(adapter, tx, jax.random.key(0)), job_batches(job)
    found = {0: held_out(combine(frozen, adapter))}
    for at in range(1, STEPS + 1):
        batch = {name: x[None] for name, x in next(batches).items() if name != "rows"}
        state, _ = step(state, frozen, batch)
        if at in (STEPS // 6, STEPS // 2, STEPS):
            found[at] = held_out(combine(frozen, state.trainable))
    return found


curves = {name: trained(frozen) for name, frozen in bases.items()}
plot_losses(
    {name: (list(found), list(found.values())) for name, found in curves.items()},
    ylabel="held-out loss (nats per trained token)",
)

# %%
for name, found in curves.items():
    print(f"{name:18} before {found[0]:.3f}, after {found[STEPS]:.3f}")
dense, nf4 = curves.values()
assert abs(nf4[STEPS] - dense[STEPS]) < 0.5 * (nf4[0] - dense[0])
assert nf4[STEPS] < dense[0]

# %% [markdown]
# Rounding makes the untrained model somewhat worse. Training takes most of that away, and what is
# left is small against what was gained.
#
# ## To remember
#
# - Four bits are a place in a list of sixteen values, times the largest weight of its block.
# - NF4's values stand where normally distributed weights are: about 9 % error in blocks of 64.
# - With double quantization: 4.13 bits per weight, a quarter of bfloat16.
# - The rounded base is frozen, gradients go through it to the adapter, and the adapter makes good
#   much of what was lost.
# - Merge into the *dequantized* base. To round a merged model again would round the adapter away.
#
# To try: `LoraConfig(init_lora_weights="loftq")` in the last run (`init_loftq` with the whole base
# and its layouts); blocks of 1024; a heavier tail in `kinds`.
#
# Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; Li et al. 2023, "LoftQ".
