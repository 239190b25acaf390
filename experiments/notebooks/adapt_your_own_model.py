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
# # Adapt your own model
#
# LoRA is not for language models alone. Here a small vision transformer, written in plain Flax,
# learns the handwritten digits 0 to 4, and an adapter then teaches it 5 to 9. The model's code is
# not touched: `lora_linen` wraps a Linen module, `lora_nnx` an NNX module, and both halves of this
# notebook do the same.
#
# You need to have written a Flax module before; nothing else.

# %%
# %matplotlib inline
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope
from flax import nnx
from sklearn.datasets import load_digits

from lora_jax import (
    InputError,
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    merge_adapter,
    nnx_adapter,
    nnx_layouts,
    nnx_params,
    optim,
    with_nnx_params,
)
from lora_jax.lora import find_targets
from lora_jax.report import plot_losses, plot_matrices, plot_table

# %% [markdown]
# ## The data
#
# 1,797 images of 8 × 8 pixels, which come with scikit-learn. Every fifth is held out.

# %%
images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8).astype(np.float32) / 16
held_out = np.arange(len(labels)) % 5 == 0


def split(digits):
    """Images and labels of some digits: to train on, and held out."""
    chosen = np.isin(labels, digits)
    return tuple((images[chosen & part], labels[chosen & part]) for part in (~held_out, held_out))


low_train, low_test = split(range(5))
high_train, high_test = split(range(5, 10))
print(len(low_train[0]), "images of 0 to 4 to train on,", len(high_train[0]), "of 5 to 9")
plot_matrices({str(d): images[np.argmax(labels == d)] for d in range(10)})

# %% [markdown]
# ## The model
#
# Sixteen patches of 2 × 2 pixels, two transformer blocks, a head for ten classes. Nothing in it
# knows of LoRA.

# %%
PATCHES, WIDTH, HEADS, BLOCKS = 16, 32, 4, 2


def patches(images):
    """(batch, 8, 8) images as (batch, 16, 4) patches."""
    cut = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
    return cut.reshape(-1, PATCHES, 4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Dense(WIDTH, name="embed")(patches(images))
        x += self.param("positions", nn.initializers.normal(0.02), (PATCHES, WIDTH))
        for i in range(BLOCKS):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(axis=1))


vit = ViT()
params = jax.jit(vit.init)(jax.random.key(0), images[:1])["params"]

# %% [markdown]
# ## Pretraining on 0 to 4
#
# An ordinary loop. It is written so that it can be used again below: what is *trained* and what is
# *frozen* are two trees, and the model sees them combined.

# %%
BATCH, STEPS = 128, 150


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def drawn(data, seed=0):
    """Batches of images and labels, at random."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = rng.integers(len(data[0]), size=BATCH)
        yield data[0][chosen], data[1][chosen]


def train(apply, trained, frozen, data, tx):
    """The trained tree after all steps, and the loss at each."""

    @jax.jit
    def step(trained, opt_state, x, y):
        def loss(trained):
            return cross_entropy(apply({"params": combine(frozen, trained)}, x), y)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    opt_state, losses = tx.init(trained), []
    for x, y in drawn(data):
        trained, opt_state, value = step(trained, opt_state, x, y)
        losses.append(value)
    return trained, [float(value) for value in losses]


def accuracies(logits_of):
    """Shares of held-out images of either kind that are named right."""
    compiled = jax.jit(lambda x: logits_of(x))
    return {
        name: float(np.mean(np.argmax(compiled(x), -1) == y))
        for name, (x, y) in {"0 to 4": low_test, "5 to 9": high_test}.items()
    }


base, _ = train(vit.apply, params, {}, low_train, optax.adam(3e-3))
found = {"base": accuracies(lambda x: vit.apply({"params": base}, x))}
print(found)
assert found["base"]["0 to 4"] > 0.8 and found["base"]["5 to 9"] == 0

# %% [markdown]
# ## Which layers?
#
# `LoraConfig` has PEFT's names. `target_modules` chooses layers by the end of their path; here all
# four of the attention and both of the MLP. The head has to learn new classes from nothing, which
# is no *small* correction, so it is trained whole: `modules_to_save`.
#
# Kernels of the attention have three axes: `query` is (width, heads, width of a head), and sums
# over the first; `out` sums over its first two. No rule tells the two apart by shape, so the
# library reads it off the program: `layouts` traces the module once, without computing.

# %%
config = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["query", "key", "value", "out", "up", "down"],
    modules_to_save=["head"],
)
lora_vit = lora_linen(vit)
layouts = lora_vit.layouts(base, images[:1])
adapter = init_adapter(jax.random.key(1), base, config, layouts=layouts)


def report(params, config, layouts):
    """A line for each adapted layer, and what all of them hold."""
    total = 0
    print(f"{'layer':26} {'inputs':>6} {'outputs':>7}  summed over  {'rank':>4} {'trained':>7}")
    for target in find_targets(params, config, layouts=layouts):
        (name,), (rank,), axes = target.names, target.ranks, str(target.layout.contracting)
        size = rank * (target.d_in + target.d_out)
        total += size
        print(f"{name:26} {target.d_in:6} {target.d_out:7}  {axes:11}  {rank:4} {size:7,}")
    whole = sum(x.size for x in jax.tree.leaves(params))
    print(f"together {total:,} beside {whole:,} frozen ones: {total / whole:.0%}")


report(base, config, layouts)
treescope.display(adapter)

# %% [markdown]
# (Of a model this small a rank of 4 is a fifth. The share falls with the width: it is some
# thousandths in a model of billions.)
#
# A name that is misspelt is an error, not a layer that silently stays as it was:

# %%
try:
    find_targets(base, LoraConfig(r=4, target_modules=["querry", "value"]), layouts=layouts)
except InputError as error:
    print(error)

# %% [markdown]
# ## Adapting to 5 to 9
#
# The same loop: now the adapter is trained, and the base is frozen. `freeze_base` keeps the
# optimizer from what is no part of training (the scaling beside the factors). To see what LoRA does
# beyond a new head, a second run trains the head alone.

# %%
tx = optim.freeze_base(optax.adam(1e-2))
adapter, lora_losses = train(lora_vit.apply, adapter, base, high_train, tx)
head, head_losses = train(vit.apply, {"head": base["head"]}, base, high_train, optax.adam(1e-2))
steps = range(1, STEPS + 1)
plot_losses(
    {"LoRA and head": (steps, lora_losses), "head alone": (steps, head_losses)},
    ylabel="training loss (nats per image)",
)

# %%
found["base + new head"] = accuracies(lambda x: vit.apply({"params": combine(base, head)}, x))
found["base + adapter"] = accuracies(
    lambda x: lora_vit.apply({"params": combine(base, adapter)}, x)
)
plot_table(found, title="share of held-out images named right")

# %%
assert found["base + adapter"]["5 to 9"] > max(0.8, found["base + new head"]["5 to 9"])

# %% [markdown]
# The adapter knows 5 to 9, and has unlearnt 0 to 4, of which it saw none. But nothing is *lost*:
# the base is as it was, bit for bit, and without the adapter it names 0 to 4 as before. An adapter
# is a switch.
#
# ## Merging
#
# Where the switch is not needed, the correction is added to the weights. What comes out is a tree
# for the plain `ViT`, without LoRA.

# %%
merged = merge_adapter(base, adapter, layouts=layouts)
beside = jax.jit(lora_vit.apply)({"params": combine(base, adapter)}, high_test[0])
inside = jax.jit(vit.apply)({"params": merged}, high_test[0])
print(f"largest difference of the logits: {float(jnp.abs(beside - inside).max()):.0e}")
assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
assert jnp.allclose(beside, inside, atol=1e-3)

# %% [markdown]
# ## The same in NNX
#
# In NNX a module *holds* its parameters. The model once more, and its pretraining with NNX's own
# optimizer:


# %%
class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x += self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NNXViT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((PATCHES, WIDTH)))
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        x = self.embed(patches(images)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def train_nnx(model, kind, data, rate):
    """Train a module's variables of one kind, in place."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=kind)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return cross_entropy(model(x), y)

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, kind))(model))

    for x, y in drawn(data):
        step(model, optimizer, x, y)


model = NNXViT(nnx.Rngs(0))
train_nnx(model, nnx.Param, low_train, 3e-3)
found_nnx = {"base": accuracies(model)}

# %% [markdown]
# `nnx_params` gives the parameters as a plain tree; `init_adapter` makes an adapter for it, as
# above; `lora_nnx` gives a module with the two together. Its base is `nnx.Param`, what is trained
# of the adapter is `nnx.LoRAParam`, so NNX's own filters tell them apart. The module that was given
# stays as it is.

# %%
nnx_base, nnx_config = nnx_params(model), config
nnx_layout = nnx_layouts(model, images[:1])
report(nnx_base, nnx_config, nnx_layout)
fresh = init_adapter(jax.random.key(1), nnx_base, nnx_config, layouts=nnx_layout)
adapted = lora_nnx(model, fresh, layouts=nnx_layout)
train_nnx(adapted, nnx.LoRAParam, high_train, 1e-2)
found_nnx |= {"base + adapter": accuracies(adapted), "base, afterwards": accuracies(model)}
plot_table(found_nnx, title="NNX: share of held-out images named right")

# %%
assert found_nnx["base"] == found_nnx["base, afterwards"]
assert found_nnx["base + adapter"]["5 to 9"] > 0.8

# %% [markdown]
# And merged: `nnx_adapter` takes the trained adapter out of the module, `with_nnx_params` gives the
# plain module other parameters.

# %%
merged = merge_adapter(nnx_base, nnx_adapter(adapted), layouts=nnx_layout)
plain = with_nnx_params(model, merged)
difference = float(jnp.abs(plain(high_test[0]) - adapted(high_test[0])).max())
print(f"largest difference of the logits: {difference:.0e}")
assert difference < 1e-3

# %% [markdown]
# ## To remember
#
# - Your module stays as it is: `lora_linen(module)` or `lora_nnx(module, adapter)`.
# - The adapter is a tree: differentiate by it, save it, count it, merge it.
# - `layouts` tells what axes kernels sum over, read off the program.
# - New classes: train the head whole with `modules_to_save`.
#
# To try: `r=1`; leave `modules_to_save` out and add `"head"` to `target_modules`; a convolution in
# place of `embed` (it is adapted too); adapt on all ten digits, so that nothing is unlearnt.
