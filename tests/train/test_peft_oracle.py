"""Training step for step beside PEFT, transformers and torch's AdamW."""

import jax
import numpy as np
import pytest

from lora_jax.adapters import save_adapter
from lora_jax.data import eval_batches
from lora_jax.train import evaluate, init_state, make_eval_step, make_step, prepare
from lora_jax.train._loop import job_batches
from lora_jax.train._optimizer import make_optimizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

STEPS = 5


@pytest.fixture(scope="module")
def job(base_dir, rows_file, tmp_path_factory):
    from lora_jax import LoraConfig
    from lora_jax.train import DataSection, ModelSection, RunConfig, TrainSection

    return prepare(
        RunConfig(
            model=ModelSection(path=str(base_dir), remat="everything"),
            data=DataSection(train=str(rows_file), max_length=48, eval_share=0.2, packing=False),
            lora=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
            train=TrainSection(
                steps=STEPS, batch_size=4, learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0
            ),
            output="unused",
        )
    )


@pytest.fixture
def theirs(base_dir, job, tmp_path):
    """transformers' model with our untrained adapter, read by PEFT."""
    model = transformers.LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    save_adapter(tmp_path / "adapter", job.trainable, job.config.lora, layouts=job.layouts)
    return peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)


def their_loss(model, batch):
    """Mean over the trained tokens; the labels of all others are -100."""
    ids = torch.tensor(batch["input_ids"], dtype=torch.long)
    return model(
        input_ids=ids,
        attention_mask=torch.tensor(batch["segment_ids"] > 0).long(),
        labels=ids.masked_fill(~torch.tensor(batch["loss_mask"]), -100),
    ).loss


def test_loss_equals_transformers(job, theirs):
    options = {"batch_size": 8, "seq_length": 48, "packing": False}
    (batch,) = eval_batches(job.eval, **options)
    ours = evaluate(make_eval_step(job.model, chunk=32), job.params, [batch])
    with torch.no_grad():
        expected = float(their_loss(theirs, batch))
    np.testing.assert_allclose(ours.loss, expected, rtol=1e-6)


def test_training_equals_peft(job, theirs):
    train, batches = job.config.train, job_batches(job)
    tx = make_optimizer(train, STEPS, job.mask)
    step, state = make_step(job.model, tx), init_state(job.trainable, tx, jax.random.key(0))
    weights = [p for p in theirs.parameters() if p.requires_grad]
    options = {"betas": (train.beta1, train.beta2), "weight_decay": train.weight_decay}
    optimizer = torch.optim.AdamW(weights, lr=train.learning_rate, **options)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * n / STEPS))
    )
    for _ in range(STEPS):
        batch = next(batches)
        arrays = {name: x[None] for name, x in batch.items() if name != "rows"}
        state, metrics = step(state, job.base, arrays)
        loss = their_loss(theirs, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
        np.testing.assert_allclose(float(metrics["loss"]), float(loss.detach()), rtol=1e-5)
        np.testing.assert_allclose(float(metrics["grad_norm"]), float(norm), rtol=1e-4)
    compare(state.trainable, theirs)


def compare(adapter, model):
    """Every factor of every layer, relative to its norm."""
    found = {
        name.split("base_model.model.")[1]: p.detach().numpy().T
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert len(found) == 2 * 7 * 2
    for name, value in found.items():
        *modules, factor, _, _ = name.split(".")
        node = adapter
        for module in (m for m in modules if not m.isdigit()):
            node = node[module]
        layer = int(next(m for m in modules if m.isdigit()))
        ours = np.asarray(node[factor][layer])
        error = np.linalg.norm(ours - value) / np.linalg.norm(value)
        assert error < 1e-4, (name, error)
