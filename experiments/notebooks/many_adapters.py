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
# # Many adapters on one base
#
# An adapter is a few per cent of its base. So one base in memory can serve many tasks, or many
# users: an adapter each, and none of them copies the base. This notebook trains three tiny adapters
# *in one step*, swaps them, mixes two of them, and finally answers a batch in which every row goes
# through another one.

# %%
# %matplotlib inline
import ast
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope

from lora_jax import choose_rows, combine, init_adapter, optim, take_adapter
from lora_jax.adapters import AdapterBank, save_adapter, weighted_adapter
from lora_jax.data import docstring_rows, encode_prompt, eval_batches, read_rows, stop_ids
from lora_jax.models import generate
from lora_jax.report import plot_losses, plot_table
from lora_jax.train import (
    evaluate,
    init_joint_state,
    job_batches,
    make_eval_step,
    make_joint_step,
    prepare,
    run_config,
)

# %% [markdown]
# ## Three tasks
#
# The base is the language model of 3.8 million parameters that comes with the library; it has read
# Python. All three tasks are given the same thing, the source of a function of the standard
# library, and asked the same: they differ in the answer alone.
#
# - **sentence**: the first sentence of its docstring;
# - **name**: its name, in words;
# - **arguments**: what it takes.

# %%
SEQ, BATCH, STEPS = 80, 4, 40


def answers(row):
    """What each task says of a function."""
    function = ast.parse(row["input"].strip()).body[0]
    names = [x.arg for x in function.args.args]
    return {
        "sentence": row["output"],
        "name": "It is called " + " ".join(function.name.strip("_").split("_")) + ".",
        "arguments": f"It takes {', '.join(names) or 'nothing'}.",
    }


def short(rows, count):
    return [row for row in rows if len(row["input"]) < 200][:count]


train_rows = short(docstring_rows(held_out=False), 400)
test_rows = short(docstring_rows(held_out=True), 30)
print(test_rows[1]["input"])
tasks = answers(test_rows[1])
print(json.dumps(tasks, indent=1))

# %%
folder = Path(tempfile.mkdtemp())


def job_of(task):
    """The base and the rows of a task, made ready."""
    for part, rows in (("train", train_rows), ("test", test_rows)):
        asked = [{**row, "instruction": "Tell.", "output": answers(row)[task]} for row in rows]
        lines = [json.dumps({key: row[key] for key in ("instruction", "input", "output")})
                 for row in asked]  # fmt: skip
        (folder / f"{task}-{part}.jsonl").write_text("\n".join(lines))
    raw = {
        "data": {"train": str(folder / f"{task}-train.jsonl"), "template": "plain",
                 "eval": str(folder / f"{task}-test.jsonl"), "max_length": SEQ},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "model": {"remat": "everything"},
        "train": {"batch_size": BATCH, "loss_chunk": SEQ},
        "output": str(folder / task),
    }  # fmt: skip
    return prepare(run_config(raw, [], "this notebook"))


jobs = {task: job_of(task) for task in tasks}
job = jobs["sentence"]
base, model, layouts, config = job.base, job.model, job.layouts, job.config.lora
counts = job.counts()
print(f"{counts['frozen']:,} frozen parameters, {counts['trainable']:,} in an adapter:", end=" ")
print(f"{counts['trainable'] / counts['frozen']:.1%}")

# %% [markdown]
# ## Trained together
#
# `make_joint_step` moves several adapters in one step, over one base, of which there is no copy;
# with `own_data` each learns from rows of its own. Each moves as it would alone.

# %%
tx = optim.freeze_base(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(5e-3, 0, STEPS)))
)
step = make_joint_step(model, tx, chunk=SEQ, own_data=True)
fresh = [init_adapter(jax.random.key(i), base, config, layouts=layouts) for i in range(len(jobs))]
state = init_joint_state(fresh, tx, seeds=[0] * len(jobs), rates=[1.0] * len(jobs))
batches, losses = [job_batches(own) for own in jobs.values()], []
for _ in range(STEPS):
    several = [next(own) for own in batches]
    batch = {name: np.stack([own[name][None] for own in several])
             for name in several[0] if name != "rows"}  # fmt: skip
    state, metrics = step(state, base, batch)
    losses.append(metrics["loss"])
adapters = {task: take_adapter(state.trainable, i, fresh[i]) for i, task in enumerate(jobs)}
losses = np.asarray(losses)
plot_losses(
    {task: (range(1, STEPS + 1), losses[:, i]) for i, task in enumerate(jobs)},
    title="three adapters, one step",
)

# %% [markdown]
# ## Swapping
#
# The base's tree with an adapter laid over it: `combine(base, adapter)`. To swap is to combine with
# another one. Each adapter should be the best at its own task.

# %%
eval_step = make_eval_step(model, chunk=SEQ)


def held_out(params, task):
    """Mean loss on functions of modules that nobody here has read."""
    rows = eval_batches(jobs[task].eval, batch_size=BATCH, seq_length=SEQ)
    return evaluate(eval_step, params, rows).loss


table = {"base": {f"on {task}": held_out(base, task) for task in jobs}}
for name, adapter in adapters.items():
    params = combine(base, adapter)
    table[f"adapter: {name}"] = {f"on {task}": held_out(params, task) for task in jobs}
plot_table(table, title="held-out loss (nats per trained token)")

# %%
for task in jobs:
    column = {name: row[f"on {task}"] for name, row in table.items()}
    assert min(column, key=column.get) == f"adapter: {task}"

# %% [markdown]
# An adapter is a small thing to keep, too. `save_adapter` writes PEFT's two files:

# %%
save_adapter(folder / "name", adapters["name"], config, layouts=layouts)
sizes = {path.name: path.stat().st_size for path in (folder / "name").iterdir()}
print({name: f"{size:,} bytes" for name, size in sizes.items()})
treescope.display(adapters["name"])

# %% [markdown]
# ## Mixing two
#
# Adapters are corrections, and corrections can be added: $w \cdot s_1 A_1 B_1 + (1 - w) \cdot s_2
# A_2 B_2$. The sum of two matrices of rank $r$ has rank $2r$; `weighted_adapter` makes an adapter
# of it, by PEFT's rules. `"cat"` sets the factors side by side and is exact; `"svd"` brings it down
# to the old rank; others (`"ties"`, `"dare_linear"`, ...) first throw away what the two disagree
# on.

# %%
pair = [(adapters["name"], config), (adapters["arguments"], config)]
shares = (0.0, 0.25, 0.5, 0.75, 1.0)
mixed = [weighted_adapter(pair, [w, 1 - w], "cat", layouts=layouts)[0] for w in shares]
params = [combine(base, adapter) for adapter in mixed]
curves = {f"on {task}": (shares, [held_out(own, task) for own in params]) for task in jobs}
plot_losses(
    curves,
    title="w · name + (1 − w) · arguments",
    xlabel="weight w of the adapter for names",
    ylabel="held-out loss (nats per trained token)",
)

# %%
ends = {task: curves[f"on {task}"][1] for task in ("name", "arguments")}
assert ends["name"][-1] < ends["name"][0] and ends["arguments"][0] < ends["arguments"][-1]

# %% [markdown]
# In the middle both losses are low. Is that one model that does both? Not quite: it is asked the
# same thing for either answer, so it can only guess which one is wanted. But that is decided by one
# word, *is* or *takes*, and an even guess costs 0.69 nats, once; whichever word comes, the mixture
# knows how to go on.
#
# ## One batch, an adapter for every row
#
# A server does not get its requests sorted by adapter. An `AdapterBank` keeps adapters in numbered
# slots of one shape, and `choose_rows` says which slot each row of the batch goes through; -1, or
# the name `None`, is the plain base.

# %%
bank = AdapterBank.empty(base, config, slots=4, layouts=layouts)
for name, adapter in adapters.items():
    bank = bank.swap(name, adapter)
print("slots:", bank.names)

asked = {row.messages[0].input: row.messages[:-1]
         for row in read_rows(str(folder / "name-test.jsonl")).rows}  # fmt: skip
template, tokenizer = job.eval.template, job.pretrained.tokenizer


def told(source, names):
    """The answers to one question, asked once for every adapter, in one batch."""
    prompt = encode_prompt(asked[source], template, tokenizer)
    ids = generate(
        model,
        combine(base, bank.overlay(names)),
        [prompt] * len(names),
        max_new_tokens=16,
        eos_ids=stop_ids(template, tokenizer),
    )
    return [tokenizer.decode(own).strip() for own in ids]


everyone = [*adapters, None]
source = test_rows[1]["input"]
together = told(source, everyone)
print(source)
for name, text in zip(everyone, together, strict=True):
    print(f"{name or 'the base':>10}: {' '.join(text.split())}")

# %% [markdown]
# Each row speaks as its own adapter has taught it, and the last one as if there were no adapters.
# (The names are copied from the source; for a true sentence about it the model is far too small.)
#
# A row's answer is the same whoever sits beside it:

# %%
turned = told(source, everyone[::-1])
assert turned == together[::-1]

# %% [markdown]
# ## Nothing is compiled anew
#
# Which rows go where is *data*. So is what the slots hold. A function that was compiled once serves
# every choice and every adapter that is swapped in; the counter below goes up only when JAX traces.

# %%
traces = 0


@jax.jit
def logits(slots, rows, ids):
    global traces
    traces += 1
    return model.apply({"params": combine(base, combine(slots, choose_rows(slots, rows)))}, ids)


ids = jnp.tile(jnp.asarray(encode_prompt(asked[source], template, tokenizer))[None], (4, 1))
first = logits(bank.slots, bank.rows(everyone), ids)
logits(bank.slots, bank.rows(["name", "name", None, "sentence"]), ids)
newer = bank.swap("name", adapters["arguments"])  # another adapter in the same slot
swapped = logits(newer.slots, newer.rows(everyone), ids)
print("traced", traces, "time")
row = everyone.index("name")
other = everyone.index("arguments")
assert traces == 1
assert jnp.allclose(swapped[row], first[other], atol=1e-3)
assert jnp.array_equal(swapped[other], first[other])

# %% [markdown]
# ## To remember
#
# - An adapter is a tree of a few per cent of the base: keep many, combine with one.
# - `make_joint_step` trains several in one step; it pays where batches are small.
# - `weighted_adapter` makes one of several.
# - `AdapterBank` and `choose_rows` serve all of them in one batch, compiled once.
#
# To try: `"svd"` and `"ties"` in place of `"cat"`; a weight below zero; training through the bank
# (differentiate by `bank.slots`: each row's gradient reaches its own slot alone); a bank with one
# slot.
#
# Sheng et al. 2023, "S-LoRA"; Chen et al. 2023, "Punica"; Yadav et al. 2023, "TIES-Merging".
