"""The JAX side on an accelerator: an 8B shape in bfloat16, dense and in NF4, and its decoding."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases_jax import LAYOUTS, Spec, adamw, lora_config
from child import Case

from lora_jax import QuantConfig, dequantize, init_adapter, lora_linen, quantize
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.models import (
    CausalLM,
    ModelConfig,
    abstract_params,
    generate,
    load_pretrained,
    save_pretrained,
)
from lora_jax.train import init_state, make_step

DTYPE = jnp.bfloat16
QLORA = QuantConfig()


def prepare(spec: Spec) -> Case:
    """A model of the same width but few layers on disk, for the gate."""
    config, directory = ModelConfig(**spec["shape"]), Path(spec["dir"])
    params = random_params(config, None)
    save_pretrained(directory / "model", params, config, dtype="bfloat16")
    lora = lora_config(spec)
    adapter = init_adapter(jax.random.key(2), params, lora, layouts=LAYOUTS)
    save_adapter(directory / "adapter", adapter, lora, layouts=LAYOUTS)
    np.save(directory / "ids.npy", np.asarray(tokens(spec)))
    return Case(lambda: 0.0)


def tokens(spec: Spec) -> jax.Array:
    shape, vocab = (spec["batch"], spec["seq"]), spec["shape"]["vocab_size"]
    return jax.random.randint(jax.random.key(0), shape, 0, vocab)


def random_params(config: ModelConfig, quant: QuantConfig | None) -> Any:
    """Normal weights made on the device, each leaf quantized before the next one is made."""
    stored = abstract_params(config, quant=quant, param_dtype="bfloat16")
    paths, structure = jax.tree_util.tree_flatten_with_path(
        stored, is_leaf=lambda x: hasattr(x, "unbox")
    )
    return jax.tree.unflatten(
        structure, [made(i, path, leaf, quant) for i, (path, leaf) in enumerate(paths)]
    )


def made(number: int, path: Any, leaf: Any, quant: QuantConfig | None) -> Any:
    if "norm" in jax.tree_util.keystr(path):
        return jnp.ones(leaf.shape, DTYPE)
    key = jax.random.key(number)
    # Drawn in bfloat16: float32 numbers of a whole stack would not fit beside it.
    weight = jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, DTYPE))(key)
    if not hasattr(leaf, "unbox"):
        return weight
    assert quant is not None
    return jax.block_until_ready(quantize(weight, quant, stacked=1))


def model_of(
    spec: Spec, quant: QuantConfig | None, dora: bool = False
) -> tuple[CausalLM, Any, Any]:
    """(module, parameters, adapter): from the gate's files, or made on the device."""
    if "dir" in spec:
        directory = Path(spec["dir"])
        loaded = load_pretrained(
            directory / "model", quant=quant, dtype="bfloat16", remat=spec["remat"]
        )
        adapter, _ = load_adapter(directory / "adapter", loaded.params, layouts=loaded.layouts)
        return loaded.module, loaded.params, adapter
    config = ModelConfig(**spec["shape"])
    params = random_params(config, quant)
    lora = dataclasses.replace(lora_config(spec), use_dora=dora)
    # Without magnitudes, shapes would do; they are measured on the weights.
    adapter = init_adapter(jax.random.key(2), params, lora, layouts=LAYOUTS)
    return CausalLM(config, dtype=DTYPE, remat=spec["remat"]), params, adapter


def training(
    spec: Spec, quant: QuantConfig | None = None, remat: str | None = None, dora: bool = False
) -> Case:
    """A step of `lora_jax.train` over all tokens."""
    spec = spec if remat is None else spec | {"remat": remat}
    module, params, adapter = model_of(spec, quant, dora)
    tx, ids = adamw(), tokens(spec)
    step = make_step(lora_linen(module), tx)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    ones = jnp.ones_like(ids)
    batch = {"input_ids": ids, "positions": positions, "segment_ids": ones, "loss_mask": ones == 1}
    batches = jax.tree.map(lambda x: x[None], batch)
    state = [init_state(adapter, tx, jax.random.key(0), dtype=DTYPE)]

    def run() -> Any:
        state[0], metrics = step(state[0], params, batches)
        return metrics["loss"]

    return Case(
        run,
        facts={"amount": ids.size},
        finish=lambda loss: jax.block_until_ready((state[0].trainable, loss))[1],
        device_peak=device_peak,
    )


def dequantization(spec: Spec) -> Case:
    """A stack of matrices to bfloat16; bytes read and written count."""
    layers, *shape = spec["matrix"]
    weight = jax.random.normal(jax.random.key(0), (layers, *shape), DTYPE)
    q = quantize(weight, QLORA, stacked=1)
    read = jax.jit(lambda q: dequantize(q, DTYPE))
    amount = spec["repeats"] * (q.nbytes + weight.size * 2)
    error = float(jnp.sqrt(jnp.mean((read(q) - weight).astype(jnp.float32) ** 2)))

    def run() -> Any:
        # Queued together, so that the time to launch one hides behind the one before.
        return [read(q) for _ in range(spec["repeats"])][-1]

    def finish(last: Any) -> float:
        jax.block_until_ready(last)
        return error

    return Case(run, facts={"amount": amount}, finish=finish, device_peak=device_peak)


def decoding(spec: Spec, quant: QuantConfig | None = None) -> Case:
    """One prompt continued greedily, prefill included."""
    config = ModelConfig(**spec["shape"])
    module, params = CausalLM(config, dtype=DTYPE), random_params(config, quant)
    model = module if quant is None else lora_linen(module)
    prompt, new = [[1, 2, 3, 4, 5, 6, 7, 8]], spec["new_tokens"]

    def run() -> float:
        (row,) = generate(model, params, prompt, max_new_tokens=new)
        assert len(row) == new
        return 0.0

    return Case(run, facts={"amount": new}, device_peak=device_peak)


def device_peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


CASES = {
    "prepare": prepare,
    "lora": training,
    "nf4": functools.partial(training, quant=QLORA),
    "nf4_least": functools.partial(training, quant=QLORA, remat="nothing"),
    "dora": functools.partial(training, dora=True),
    "dequantize": dequantization,
    "decode": decoding,
    "decode_nf4": functools.partial(decoding, quant=QLORA),
}
