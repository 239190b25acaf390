"""What a program tells of its parameters' axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lora_jax import LoraConfig, combine, init_adapter, lora_linen, merge_adapter, quantize
from lora_jax.lora import KernelLayout
from lora_jax.transform._reading import read_program
from tests import compiled

X = jnp.ones((2, 5, 4))


def w(*shape):
    return {"w": jnp.ones(shape)}


def scanned(product):
    """Layers in a scan, each recomputed in the backward pass."""

    def model(params, x):
        step = jax.checkpoint(lambda x, own: (product(x, own), None))
        return jax.lax.scan(step, x, params["w"])[0]

    return model


def recurrent(params, x):
    """The first state is no input, but what comes of it is."""

    def step(state, x):
        return x + state @ params["w"].T, None

    return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0]


def looped(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ params["w"].T, x)


def branched(params, x):
    ways = (lambda w, x: jnp.einsum("btd,efd->btef", x, w), lambda w, x: jnp.ones((2, 5, 2, 3)))
    return jax.lax.cond(x[0, 0, 0] > 0, *ways, params["w"], x)


CASES = {
    "a transposed kernel": (lambda p, x: x @ p["w"].T, w(6, 4), KernelLayout((1,))),
    "fused queries, keys and values": (
        lambda p, x: [x @ part for part in jnp.split(p["w"], 3, axis=1)],
        w(4, 12),
        KernelLayout((0,)),
    ),
    "queries": (
        lambda p, x: jnp.einsum("btd,hdk->bthk", x, p["w"]),
        w(2, 4, 3),
        KernelLayout((1,)),
    ),
    "keys and values": (
        lambda p, x: jnp.einsum("bsd,ckdh->cbskh", x, p["w"]),
        w(2, 3, 4, 5),
        KernelLayout((2,)),
    ),
    "the attention's output": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x.reshape(2, 5, 2, 2), p["w"]),
        w(2, 2, 7),
        KernelLayout((0, 1)),
    ),
    "joined by the caller": (
        lambda p, x: x @ p["w"].reshape(4, 6).astype(x.dtype),
        w(2, 2, 6),
        KernelLayout((0, 1)),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebd,efd->ebf", x, p["w"]),
        w(2, 6, 4),
        KernelLayout((2,), experts=True),
    ),
    "experts by their numbers": (
        lambda p, x: sum(x @ p["w"][i].T for i in range(3)),
        w(3, 6, 4),
        KernelLayout((2,), experts=True),
    ),
    "experts by numbers that a loop counts": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: x @ p["w"][i].T, x),
        w(3, 4, 4),
        KernelLayout((2,), experts=True),
    ),
    "the only one of its kind": (lambda p, x: x @ p["w"][0], w(1, 4, 6), KernelLayout((1,))),
    "convolutions by their numbers": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"][1], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        w(2, 3, 4, 6),
        KernelLayout(()),
    ),
    "layers": (scanned(lambda x, w: x @ w.T), w(3, 4, 4), KernelLayout((2,))),
    "experts in layers": (
        scanned(lambda x, w: jnp.einsum("ebd,efd->ebf", x, w)),
        w(3, 2, 4, 4),
        KernelLayout((3,), experts=True),
    ),
    "recurrent": (recurrent, w(4, 4), KernelLayout((1,))),
    "in a loop": (looped, w(4, 4), KernelLayout((1,))),
    "in a branch": (branched, w(2, 3, 4), KernelLayout((2,))),
    "mapped over": (
        lambda p, x: jax.vmap(lambda x: x @ p["w"].T)(x),
        w(6, 4),
        KernelLayout((1,)),
    ),
    "normalized": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True)).T,
        w(6, 4),
        KernelLayout((1,)),
    ),
    "looked up, and the head as well": (
        lambda p, x: jnp.take(p["w"], jnp.argmax(x, -1), axis=0) @ p["w"].T,
        w(9, 4),
        KernelLayout((0,)),
    ),
    "a convolution of torch's order": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "OIH", "NHC"), feature_group_count=2
        ),
        w(6, 2, 3),
        KernelLayout((2, 1), window=(3,), groups=2),
    ),
    "a gate": (lambda p, x: x * p["w"], w(5, 4), None),
    "positions": (lambda p, x: (x[0] + p["w"]) @ jnp.ones((4, 4)), w(5, 4), None),
    "only among themselves": (lambda p, x: x + jnp.sum(p["w"] @ p["w"].T), w(4, 4), None),
    "not used": (lambda p, x: x, w(2, 3, 4), None),
    "each output's own": (
        lambda p, x: jnp.einsum("btd,tdf->btf", x, p["w"]),
        w(5, 4, 3),
        KernelLayout((1,), experts=True),
    ),
    "a batch axis in the middle": (
        lambda p, x: jnp.einsum("btd,dtf->btf", x, p["w"]),
        w(4, 5, 3),
        KernelLayout(()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_program_tells(case):
    function, params, expected = CASES[case]
    use = read_program(function, params, X).uses.get("w", KernelLayout(()))
    assert use == (expected or KernelLayout(()))
    shapes = jax.eval_shape(lambda: (params, X))
    assert read_program(jax.jit(function), *shapes).uses.get("w", KernelLayout(())) == use


def test_a_scan_names_what_it_cuts():
    def model(params, x):
        def step(x, own):
            return x @ own["up"] @ params["w"], None

        return jax.lax.scan(step, x, params["layers"])[0]

    params = {"w": jnp.ones((6, 4)), "layers": {"up": jnp.ones((3, 4, 6))}}
    reading = read_program(model, params, X)
    assert reading.scans == [["layers/up"]] and reading.stacked == {"layers/up"}


class Raw(nn.Module):
    """A module of somebody's own, with kernels whose axes shape alone cannot tell."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.5)
        query = jnp.einsum("btd,hdk->bthk", x, self.param("query", init, (4, 4, 4)))
        out = jnp.einsum("bthk,hkd->btd", jnp.tanh(query), self.param("out", init, (4, 4, 4)))
        return out @ self.param("turned", init, (4, 4)).T


@pytest.mark.parametrize("quantized", [False, True])
def test_a_module_of_somebody_s_own(quantized):
    model = Raw()
    params = compiled.init(model, jax.random.key(0), X)
    layouts = lora_linen(model).layouts(params, X)
    assert {path: layout.contracting for path, layout in layouts.items()} == {
        "query": (1,),
        "out": (0, 1),
        "turned": (1,),
    }
    config = LoraConfig(r=2, target_modules=list(params), init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), params, config, layouts=layouts)
    assert adapter["out_lora_A"].shape == (16, 2) and adapter["query_lora_B"].shape == (2, 16)
    if quantized:
        params["out"] = quantize(params["out"], contracting=(0, 1))
    x = jax.random.normal(jax.random.key(2), X.shape)
    merged = merge_adapter(params, adapter, layouts=layouts)
    adapted = lora_linen(model, layouts=layouts)
    out = compiled.apply(adapted, combine(params, adapter), x)
    assert jnp.allclose(out, compiled.apply(model, merged, x), rtol=1e-5, atol=1e-5)
    assert not jnp.allclose(out, compiled.apply(model, params, x), atol=1e-2)
