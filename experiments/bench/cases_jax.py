"""The JAX side: one training step of each kind, over the same files of weights and tokens."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from child import Case
from workloads import KEEP_NOTHING

from lora_jax import (
    LoraConfig,
    QuantConfig,
    QuantizedTensor,
    combine,
    dequantize,
    init_adapter,
    lora_linen,
    quantize,
)
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.lora import KernelLayout
from lora_jax.models import CausalLM, ModelConfig, load_pretrained, save_pretrained
from lora_jax.optim import freeze_base
from lora_jax.train import init_state, make_step, next_token_loss

LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
"""Large, so that the few steps of the gate tell a wrong gradient; torch's decay is given too."""

Spec = dict[str, Any]


def prepare(spec: Spec) -> Case:
    """Write the model, the adapter and the tokens that all cases read."""
    config, directory = ModelConfig(**spec["shape"]), Path(spec["dir"])
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (spec["batch"], spec["seq"])
    ids = jax.random.randint(keys[0], shape, 0, config.vocab_size)
    params = jax.jit(CausalLM(config).init)(keys[1], ids[:1, :8])["params"]
    save_pretrained(directory / "model", params, config, dtype="float32")
    lora = lora_config(spec)
    adapter = init_adapter(keys[2], params, lora, layouts=LAYOUTS)
    save_adapter(directory / "adapter", adapter, lora, layouts=LAYOUTS)
    np.save(directory / "ids.npy", np.asarray(ids))
    return Case(lambda: 0.0)


def lora_config(spec: Spec) -> LoraConfig:
    """B is not zero, so that the first loss already depends on the adapter."""
    return LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        target_modules="all-linear",
        init_lora_weights=False,
    )


def load(spec: Spec, quant: QuantConfig | None = None, remat: str = "everything") -> Any:
    """The model, the adapter and the tokens."""
    directory = Path(spec["dir"])
    model = load_pretrained(directory / "model", quant=quant, remat=remat)
    adapter, _ = load_adapter(directory / "adapter", model.params, layouts=model.layouts)
    return model, adapter, jnp.asarray(np.load(directory / "ids.npy"))


def token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean()


def training(loss: Any, trainable: Any, frozen: Any, tx: Any, reference: Any = None) -> Case:
    """A case whose step is loss(trainable, frozen), its gradient and the optimizer."""

    def step(trainable, state, frozen):
        value, gradients = jax.value_and_grad(loss)(trainable, frozen)
        updates, state = tx.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    # Copies, since steps donate them.
    state = [(jax.tree.map(jnp.array, trainable), tx.init(trainable))]
    compiled, facts = compile_timed(jax.jit(step, donate_argnums=(0, 1)), *state[0], frozen)

    def run() -> jax.Array:
        state[0], value = compiled(*state[0], frozen)
        return value

    def finish(value: jax.Array) -> jax.Array:
        return jax.block_until_ready((state[0], value))[1]

    return Case(run, reference, facts, finish)


def compile_timed(jitted: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
    """The executable, the seconds it took and the bytes it needs."""
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    return compiled, {
        "trace_s": middle - start,
        "compile_s": end - middle,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def adamw(frozen_leaves: bool = True) -> Any:
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return freeze_base(tx) if frozen_leaves else tx


def base(spec: Spec) -> Case:
    """Forward, and backward to the embeddings: all that a frozen base can cost.

    A zero is added to the embedding's rows, and differentiated.
    """
    model, _, ids = load(spec)

    def loss(offset, params):
        table = params["model"]["embed_tokens"]["embedding"]
        inner = {**params["model"], "embed_tokens": {"embedding": table + offset}}
        return token_loss(model.module.apply({"params": {**params, "model": inner}}, ids), ids)

    offset = jnp.zeros((model.config.hidden_size,))
    compiled, facts = compile_timed(jax.jit(jax.value_and_grad(loss)), offset, model.params)
    return Case(
        lambda: compiled(offset, model.params),
        facts=facts,
        finish=lambda both: jax.block_until_ready(both)[0],
    )


def full(spec: Spec) -> Case:
    """Every parameter trained."""
    model, _, ids = load(spec)

    def loss(params, _):
        return token_loss(model.module.apply({"params": params}, ids), ids)

    return training(loss, model.params, None, adamw(frozen_leaves=False))


def lora(spec: Spec, quant: QuantConfig | None = None) -> Case:
    """The adapter trained over a dense or quantized base."""
    model, adapter, ids = load(spec, quant)
    adapted = lora_linen(model.module)

    def loss(adapter, params):
        return token_loss(adapted.apply({"params": combine(params, adapter)}, ids), ids)

    reference = None
    if quant is not None and spec.get("reference", True):
        reference = float(jax.jit(loss)(adapter, dense(model.params)))
    return training(loss, adapter, model.params, adamw(), reference)


def dense(params: Any) -> Any:
    """The quantized leaves as ordinary arrays."""

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor)

    return jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def plain_autodiff(spec: Spec) -> Case:
    """The adapter without our own VJP."""
    import lora_jax.lora._linear as linear

    def plain(x, a, b, scaling):
        return (scaling * (x @ a)) @ b

    linear._delta = plain
    return lora(spec)


def train_step(spec: Spec) -> Case:
    """The adapter trained by the step of `lora_jax.train`."""
    model, adapter, ids = load(spec)
    return library_step(model, model.params, adapter, adamw(), ids)


def library_step(model: Any, base: Any, trainable: Any, tx: Any, ids: jax.Array) -> Case:
    """The step of `lora_jax.train`: chunked loss, check for what is not finite."""
    step = make_step(lora_linen(model.module), tx)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    ones = jnp.ones_like(ids)
    batch = {"input_ids": ids, "positions": positions, "segment_ids": ones, "loss_mask": ones == 1}
    batches = jax.tree.map(lambda x: x[None], batch)
    state = [init_state(trainable, tx, jax.random.key(0))]
    compiled, facts = compile_timed(step, state[0], base, batches)

    def run() -> Any:
        state[0], metrics = compiled(state[0], base, batches)
        return metrics["loss"]

    return Case(
        run, None, facts, lambda value: jax.block_until_ready((state[0].trainable, value))[1]
    )


def dequantization(spec: Spec, quant: QuantConfig) -> Case:
    """One matrix back to float32."""
    kernel = matrix(spec)
    q = quantize(kernel, quant)
    return dequantizing(kernel, lambda q: dequantize(q, jnp.float32), q, spec["repeats"])


def matrix(spec: Spec) -> jax.Array:
    """Normal random numbers, the same here and in torch."""
    values = np.random.default_rng(0).standard_normal(spec["matrix"], np.float32)
    return jnp.asarray(values)


def dequantizing(kernel: jax.Array, read: Any, q: Any, repeats: int) -> Case:
    """A case that reads `q` several times; its "loss" is the root mean square error."""
    compiled, facts = compile_timed(jax.jit(read), q)
    error = float(jnp.sqrt(jnp.mean((compiled(q) - kernel) ** 2)))

    def run() -> float:
        for _ in range(repeats):
            jax.block_until_ready(compiled(q))
        return error

    return Case(run, None, facts)


def cross_entropy(spec: Spec, chunk: int | None) -> Case:
    """Loss and its gradient by the hidden states; all logits at once without a chunk."""
    batch, seq, d, vocab = spec["batch"], spec["seq"], spec["width"], spec["vocab"]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, seq, d))
    head = jax.random.normal(keys[1], (d, vocab)) / d**0.5
    ids = jax.random.randint(keys[2], (batch, seq), 0, vocab)

    def loss(hidden, head):
        if chunk is None:
            return token_loss(hidden @ head, ids)
        mask = jnp.ones(ids.shape, bool)
        total, count = next_token_loss(lambda h: h @ head, hidden, ids, mask, chunk=chunk)
        return total / count

    compiled, facts = compile_timed(jax.jit(jax.value_and_grad(loss)), hidden, head)
    return Case(
        lambda: compiled(hidden, head),
        facts=facts,
        finish=lambda both: jax.block_until_ready(both)[0],
    )


def abstract_step(spec: Spec, remat: bool, quant: QuantConfig | None = None) -> dict[str, Any]:
    """Compile a LoRA step from shapes alone: its seconds and bytes."""
    from lora_jax.models import abstract_params

    config = ModelConfig(**spec["shape"])
    module = CausalLM(config, remat=KEEP_NOTHING) if remat else CausalLM(config)
    adapted, tx = lora_linen(module), adamw()
    params = abstract_params(config, quant=quant)
    make = functools.partial(init_adapter, config=lora_config(spec), layouts=LAYOUTS)
    adapter = jax.eval_shape(make, jax.random.key(0), abstract_params(config))
    ids = jax.ShapeDtypeStruct((spec["batch"], spec["seq"]), jnp.int32)

    def step(adapter, state, params, ids):
        def loss(adapter):
            return token_loss(adapted.apply({"params": combine(params, adapter)}, ids), ids)

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = jax.eval_shape(tx.init, adapter)
    _, facts = compile_timed(jax.jit(step, donate_argnums=(0, 1)), adapter, state, params, ids)
    trained = [
        x for path, x in jax.tree_util.tree_leaves_with_path(adapter) if "lora_" in str(path)
    ]
    facts["adapter_bytes"] = sum(x.size * x.dtype.itemsize for x in trained)
    facts["carry_bytes"] = spec["batch"] * spec["seq"] * config.hidden_size * 4
    return facts


def compilation(spec: Spec) -> Case:
    """Compile a step of `layers` layers, with the cache in `cache`."""
    if spec.get("cache"):
        jax.config.update("jax_compilation_cache_dir", spec["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    quant = NF4 if spec.get("quant") else None
    facts = abstract_step(spec, remat=spec.get("remat", False), quant=quant)
    return Case(lambda: 0.0, facts=facts)


NF4, NF4_DOUBLE = QuantConfig(double_quant=False), QuantConfig()
INT4 = QuantConfig(format="int4", double_quant=False)

CASES = {
    "prepare": prepare,
    "base": base,
    "full": full,
    "lora": lora,
    "plain_autodiff": plain_autodiff,
    "train_step": train_step,
    "nf4": functools.partial(lora, quant=NF4),
    "nf4_double": functools.partial(lora, quant=NF4_DOUBLE),
    "int4": functools.partial(lora, quant=INT4),
    "dequantize_nf4": functools.partial(dequantization, quant=NF4),
    "dequantize_nf4_double": functools.partial(dequantization, quant=NF4_DOUBLE),
    "plain_loss": functools.partial(cross_entropy, chunk=None),
    "chunk_256": functools.partial(cross_entropy, chunk=256),
    "chunk_1024": functools.partial(cross_entropy, chunk=1024),
    "compilation": compilation,
}
