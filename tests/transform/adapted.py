"""What an adapted module is held against: itself with merged weights, outputs and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import LoraConfig, combine, init_adapter, lora_linen, merge_adapter, quantize
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.lora import rule_for

KEY = jax.random.key(0)
RANDOM = dict(r=2, lora_alpha=3, init_lora_weights=False)


def inputs(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def close(one, other, rtol=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * (1e-3 + np.abs(b).max()))


def start(model, *args, targets="all-linear", layouts=None, quantized=False, call=None, **fields):
    """(base, adapter, layouts) of a module, all of random numbers, and its other collections.

    Args:
        call: Arguments of `apply` by name.
    """
    call = call or {}
    keys = {"params": jax.random.key(1), **call.get("rngs", {})}
    named = {k: v for k, v in call.items() if k not in ("mutable", "rngs")}
    rngs = {"rngs": keys} if "rngs" in call else {}
    state = dict(jax.jit(lambda: model.init(keys, *args, **named))())
    params = jax.tree.map(lambda x: x + 0.1 * inputs(*x.shape), state.pop("params"))
    layouts = lora_linen(model, layouts=layouts).layouts(params, *args, **named, **rngs)
    if quantized:
        params = map_with_path(lambda path, x: in_four_bits(path, x, layouts), params)
    config = LoraConfig(target_modules=targets, **{**RANDOM, **fields})
    return params, init_adapter(KEY, params, config, layouts=layouts), layouts, state


def in_four_bits(path, x, layouts):
    if not path.endswith("kernel"):
        return x
    rule = rule_for(layouts, path)
    axes = rule.contracting or (0,)
    return quantize(x, stacked=int(rule.stack is not None), contracting=axes)


def check(model, *args, rtol=2e-5, given=None, call=None, **options):
    """An adapted module equals itself merged, and so do the adapter's gradients.

    Returns:
        (base, adapter, layouts) for further checks.
    """
    params, adapter, layouts, state = start(model, *args, call=call, **options)
    adapted = lora_linen(model, layouts=given)

    def ours(adapter, params):
        out = adapted.apply({"params": combine(params, adapter), **state}, *args, **(call or {}))
        return total(out), out

    def merged(adapter, params):
        weights = nn.meta.unbox(merge_adapter(params, adapter, layouts=layouts))
        out = model.apply({"params": weights, **state}, *args, **(call or {}))
        return total(out), out

    both = jax.jit(lambda *trees: [jax.grad(f, has_aux=True)(*trees) for f in (ours, merged)])
    (our_gradient, our_out), (gradient, out) = both(adapter, params)
    close(our_out, out, rtol)
    close(our_gradient, gradient, rtol)
    factors = [g for path, g in leaves_with_path(our_gradient) if path.endswith("lora_A")]
    assert factors and all(jnp.abs(g).max() > 0 for g in factors)
    scalings = [g for path, g in leaves_with_path(our_gradient) if path.endswith("scaling")]
    assert not any(jnp.any(g) for g in scalings)
    return params, adapter, layouts


def total(out):
    """A number that every output counts in."""
    floats = (x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating))
    return sum(jnp.sum(jnp.sin(x)) for x in floats)
