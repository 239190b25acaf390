"""A run whose `lora_A` is frozen."""

import jax
import numpy as np
import pytest

from lora_jax._tree import leaves_with_path
from lora_jax.train import make_program, prepare
from lora_jax.train._loop import job_batches


@pytest.fixture
def job(make_config):
    options = {"optimizer": "lora_fa", "warmup": 0.0, "weight_decay": 0.01}
    lora = {
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 2},
    }
    return prepare(make_config(lora=lora, train=options))


def test_only_b_moves_and_the_loss_falls(job):
    step, init = make_program(job, 6)
    state, losses = init(job.trainable), []
    batch = {name: x[None] for name, x in next(job_batches(job)).items() if name != "rows"}
    for _ in range(4):
        state, metrics = step(state, job.base, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.999 * losses[0]
    before = dict(leaves_with_path(job.trainable))
    for path, leaf in leaves_with_path(state.trainable):
        assert np.array_equal(leaf, before[path]) != path.endswith("lora_B"), path
        if path.endswith("lora_B"):  # layer 1 has a smaller rank
            assert leaf[0].all() and leaf[1, :2].all() and not leaf[1, 2:].any()


def test_b_alone_is_counted_clipped_and_has_a_state(job):
    leaves = dict(leaves_with_path(job.trainable))
    (b,) = (x for path, x in leaves.items() if path.endswith("lora_B"))
    padding = 2 * b.shape[-1]
    assert job.counts()["trainable"] == b.size - padding
    assert job.counts()["trainable_bytes"] == b.nbytes
    chosen = {path for path, moves in leaves_with_path(job.mask(job.trainable)) if moves}
    assert chosen == {path for path in leaves if path.endswith("lora_B")}
    state = make_program(job, 6)[1](job.trainable)
    assert [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim] == [b.shape] * 2
