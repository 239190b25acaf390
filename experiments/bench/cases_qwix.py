"""qwix beside it: the same model, weights and adapter under its LoRA provider."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from cases_jax import Spec, adamw, dequantizing, load, matrix, token_loss, training
from child import Case
from qwix._src.core import qarray
from qwix._src.providers import ptq

TILE = 64
WithAux: Any = ptq.WithAux  # a flax dataclass, which type checkers do not know


def lora(spec: Spec, qtype: Any = None) -> Case:
    """The adapter trained over a dense or quantized base."""
    model, adapter, ids = load(spec)
    quant = {} if qtype is None else {"weight_qtype": qtype, "tile_size": TILE}
    options = {"rank": spec["rank"], "alpha": float(spec["alpha"])} | quant
    provider = qwix.LoraProvider(module_path=".*_proj", **options)
    adapted: Any = qwix.apply_lora_to_model(model.module, provider)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)["params"]
    trained, frozen = fill(shapes, model.params, adapter)

    def loss(trained, frozen):
        return token_loss(adapted.apply({"params": overlay(frozen, trained)}, ids), ids)

    reference = None
    if qtype is not None and spec.get("reference", True):
        reference = dense_loss(model, adapter, frozen, ids)
    del model
    return training(loss, trained, frozen, adamw(frozen_leaves=False), reference)


def fill(shapes: Any, params: Any, adapter: Any) -> tuple[Any, Any]:
    """(adapter, base) in qwix's names, the base quantized where qwix asks for it."""
    trained, frozen = {}, {}
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            inner = fill(shape, params[name], adapter.get(name, {}))
            trained |= {name: inner[0]} if inner[0] else {}
            frozen[name] = inner[1]
        elif name in ("kernel_lora_a", "kernel_lora_b"):
            trained[name] = adapter["lora_A" if name.endswith("a") else "lora_B"]
        elif isinstance(shape, WithAux):
            frozen[name] = WithAux(quantized(params[name], shape.how), shape.how)
        else:
            frozen[name] = params[name]
    return trained, frozen


def quantized(stack: jax.Array, how: Any) -> Any:
    """A stack of kernels, one after the other so that the peak is one layer's."""
    return jax.jit(lambda stack: jax.lax.map(lambda w: qarray.quantize(w, how), stack))(stack)


def overlay(frozen: Any, trained: Any) -> Any:
    """Both trees in one."""
    nested = {
        name: overlay(frozen.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in trained.items()
    }
    return {**frozen, **nested}


def dense_loss(model: Any, adapter: Any, frozen: Any, ids: jax.Array) -> float:
    """The loss of our own dense model with qwix's dequantized weights."""
    from lora_jax import combine, lora_linen

    def read(leaf: Any) -> Any:
        return jax.vmap(qarray.dequantize)(leaf.array) if isinstance(leaf, WithAux) else leaf

    weights = jax.tree.map(read, frozen, is_leaf=lambda leaf: isinstance(leaf, WithAux))
    params = combine(weights, adapter)
    adapted = lora_linen(model.module)
    return float(jax.jit(lambda p: token_loss(adapted.apply({"params": p}, ids), ids))(params))


def dequantization(spec: Spec) -> Case:
    kernel = matrix(spec)
    how = qarray.HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: TILE})
    q = jax.jit(lambda w: qarray.quantize(w, how))(kernel)
    return dequantizing(kernel, qarray.dequantize, q, spec["repeats"])


CASES = {
    "lora": lora,
    "nf4": functools.partial(lora, qtype="nf4"),
    "int4": functools.partial(lora, qtype=jnp.int4),
    "dequantize_nf4": dequantization,
}
