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
# # LoRA 是什么
#
# 一个网络学会了一件事，现在要它学另一件。最直接的办法是接着训练全部权重。这行得通，但代价不小：优化器要为每个权重再存两个数，梯度又是一个数；而且每做一项任务，就多出一份完整的模型。
#
# LoRA（*low-rank adaptation*，低秩适配，Hu 等，2021）不动原来的权重，只学一个小小的修正量。这个笔记本先说明修正量是什么、有多少参数，再真正微调一个（很小的）语言模型，看看为什么这么少的参数就够用；最后说明训练结束之后还剩下什么：没有任何额外的计算时间。
#
# 读者只需要知道什么是矩阵乘法、什么是梯度下降的一步。代码与英文版完全相同，所以图中的文字是英文。

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
# ## 一行公式
#
# 一层网络把输入乘以权重矩阵：$y = xW$。微调把权重 $W_0$ 变成 $W_0 + \Delta W$。LoRA 规定 $\Delta W$ 必须是两个瘦长矩阵的乘积：
#
# $$ W = W_0 + s \cdot A B, \qquad A: d_\text{in} \times r, \quad B: r \times d_\text{out}, \quad
# s = \frac{\alpha}{r}. $$
#
# $r$ 叫做**秩**（rank）：$AB$ 只能在 $r$ 个方向上起作用。$W_0$ 冻结不动，训练的只有 $A$ 和 $B$。系数 $s$（代码里叫 `scaling`）是固定的；有了它，改变 $r$ 时不必重新寻找学习率。
#
# **关于次序。** 论文和 PyTorch 写作 $W_0 + s \cdot BA$，因为那里一层计算的是 $Wx$，$W$ 的形状是 $(d_\text{out}, d_\text{in})$。Flax 的 kernel 形状是 $(d_\text{in}, d_\text{out})$，计算的是 $xW$，所以本库把 $A$ 写在前面。两者是同一个矩阵，只差一个转置：无论哪种写法，输入先遇到的那个因子都叫 $A$。

# %%
rng = np.random.default_rng(0)
W0, A, B = rng.normal(size=(24, 32)), rng.normal(size=(24, 2)), rng.normal(size=(2, 32))
scaling = 0.5
plot_matrices(
    {"W0": W0, "A": A, "B": B, "scaling·A·B": scaling * A @ B, "W": W0 + scaling * A @ B},
    title="24 × 32 weights, a correction of rank 2",
)

# %% [markdown]
# $A \cdot B$ 看上去像一块织物：它的每一行都是同样两行（也就是 $B$ 的两行）的混合。“低秩”就是这个意思。
#
# ## 数一数参数
#
# 一个 1000 × 1000 的矩阵有一百万个数。取 $r = 8$，两个因子一共有 $1000 \cdot 8 + 8 \cdot 1000 = 16\,000$ 个数，只占 1.6 %。`init_adapter` 为配置里点名的每一层生成这两个因子；用 `jax.eval_shape` 调用它，就只推算形状，不做计算。

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
# 最后一行是个提醒：$r = 500$ 时，两个因子和原矩阵一样大。只有当 $r$ 远小于 $d_\text{in} d_\text{out} / (d_\text{in} + d_\text{out})$ 时，LoRA 才真的节省。
#
# 适配器（adapter）**自成一棵树**，放在基座（base）的树旁边：同样是嵌套的字典，基座里是 `kernel` 的地方，它有 `lora_A` 和 `lora_B`。因此 `jax.grad` 对适配器求导，得到的只是适配器的梯度，冻结的权重从来没有梯度。`lora_B` 的初值是零：在走第一步之前，加了适配器的模型与基座的输出完全相同。
#
# ## 为什么这么少就够：一次真实的微调
#
# 权重只需*小*改，这容易相信；说改动的*秩*很低，却是对事实的论断，可以用实验来检验。本库自带一个 380 万参数的语言模型，它读过 Python 的标准库。我们微调它的**全部**权重，让它用一句话说出一个 Python 函数做什么，然后看看究竟改变了什么。

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
# ### 改变了什么？
#
# 取其中一层的 $\Delta W = W_\text{tuned} - W_0$，求它的*奇异值*：任何矩阵都是若干个秩为 1 的矩阵之和，奇异值从大到小给出每一份的大小。如果各份大小相近，就没有哪个低秩矩阵能代表 $\Delta W$。作为对照，再看一个大小和范数都与它相同的随机矩阵，以及权重 $W_0$ 本身。

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
# 噪声的曲线几乎是平的，而 $\Delta W$ 的曲线一开始就陡降：少数几个方向承担了很大一部分改变。但并不是全部！后面还拖着一条长尾巴。问题是，这条尾巴*有没有用*。
#
# ## 秩与损失
#
# 可以从两边来问：
#
# 1. **截断。** 全量微调之后，每个 $\Delta W$ 只保留前 $r$ 个方向，其余丢掉（嵌入和归一化层恢复原样）。
# 2. **训练。** 从头到尾只允许 $r$ 个方向：这就是 LoRA。

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
# 把秩截到 $r$，正是本库 `extract_adapter` 做的事：它从两个检查点中提取出一个适配器。至于第二个问题，`make_joint_step` 在同一个基座上，用同一步训练多个适配器，每一个都与单独训练时一样。`freeze_base` 让优化器只更新适配器中该训练的部分：两个因子，不包括旁边的 `scaling`。

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
# 从左往右看。每个矩阵只留一个方向，就已经完成了大部分工作；留四个，就完成了全部。奇异值的那条长尾只是随机游走，不是学习。而 LoRA 虽然从来只有 $r$ 个方向可用，却并不比全量微调差：在两者都没见过的数据上，它在这里甚至更好。（不要把这当成规律：两者的学习率不同，都没有仔细调过，而且 LoRA 没有动嵌入层和输出层。）
#
# 这只是一个小模型、一项任务。如果要学的是基座全然不懂的东西，比如另一种语言，就需要更高的秩；实验的做法是一样的。
#
# ## 合并：推理时不留痕迹
#
# 训练时，加了适配器的一层计算 $xW_0 + s \cdot (xA)B$：一次大的乘法，两次小的。训练结束后，可以把修正量一次性加进权重。`merge_adapter` 给出一棵普通的树，形状与基座相同，交给普通的模型使用：不比原来多一次运算。

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
# `unmerge_adapter` 可以把它再减出来。也可以不合并：内存里只放一个基座，配上许多小适配器，每个请求选用其中一个。那是笔记本 `many_adapters` 的内容（英文）。
#
# ## 要点
#
# - $W = W_0 + s \cdot AB$：基座冻结，只训练两个瘦长的因子。
# - 要训练的数从 $d_\text{in} d_\text{out}$ 个减少到 $r (d_\text{in} + d_\text{out})$ 个。
# - 微调*确实*会沿所有方向改变权重，但真正*起作用*的只有少数几个方向。
# - 合并之后没有任何额外开销；不合并，它就是几兆字节的一个文件。
#
# 可以试试：换一个 `LAYER` 和 `NAME`（`v_proj`、`o_proj`）；把 `STEPS` 增加到十倍；把 LoRA 的学习率改成 3e-2。如果只适配 `["q_proj", "v_proj"]`，曲线会怎样？
#
# Hu 等，2021，"LoRA: Low-Rank Adaptation of Large Language Models"；Aghajanyan 等，2020，"Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning"。
