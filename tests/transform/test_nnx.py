"""NNX modules with adapters: equal to their merged selves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import (
    lora_nnx,
    merge_adapter,
    nnx_adapter,
    nnx_params,
    quantize,
    unmerge_adapter,
    with_nnx_params,
)
from lora_jax._tree import leaves_with_path, map_with_path
from tests.transform.nnx_models import MODELS, made, run


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_its_merge(name):
    model, inputs, layouts, adapter = made(name)
    before = nnx.graphdef(model), nnx_params(model)
    adapted = lora_nnx(model, adapter, layouts=layouts)
    merged = with_nnx_params(model, merge_adapter(nnx_params(model), adapter, layouts=layouts))
    out = run(adapted, inputs)
    np.testing.assert_allclose(out, run(merged, inputs), rtol=2e-5, atol=2e-5)
    assert not np.allclose(out, run(model, inputs), atol=1e-2)
    # What the user has is as it was.
    assert nnx.graphdef(model) == before[0]
    jax.tree.map(np.testing.assert_array_equal, nnx_params(model), before[1])
    # And what went in comes out.
    jax.tree.map(np.testing.assert_array_equal, nnx_adapter(adapted), adapter)
    jax.tree.map(np.testing.assert_array_equal, nnx_params(adapted), before[1])
    back = unmerge_adapter(nnx_params(merged), adapter, layouts=layouts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, before[1])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_dense_weights(name):
    model, inputs, layouts, adapter = made(name)
    base = nnx_params(model)

    def by_merge(adapter):
        merged = merge_adapter(base, adapter, layouts=layouts)
        return jnp.sum(jnp.sin(with_nnx_params(model, merged)(inputs)))

    @nnx.jit
    def by_filter(adapted, inputs):
        def loss(adapted):
            return jnp.sum(jnp.sin(adapted(inputs)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)

    expected = dict(leaves_with_path(jax.jit(jax.grad(by_merge))(adapter)))
    got = by_filter(lora_nnx(model, adapter, layouts=layouts), inputs)
    found = {"/".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(got)}
    assert found.keys() == {p for p in expected if p.endswith(("lora_A", "lora_B"))}
    for path, gradient in found.items():
        scale = float(jnp.max(jnp.abs(expected[path])))
        np.testing.assert_allclose(gradient, expected[path], atol=2e-5 * scale, err_msg=path)


@pytest.mark.parametrize("name", ["attention", "einsums", "stack", "raw", "tied"])
def test_on_four_bits(name):
    model, inputs, layouts, adapter = made(name)
    stacked = {path: layout.stack is not None for path, layout in layouts.items()}

    def four_bits(path, leaf):
        axes = layouts[path].contracting if path in layouts else None
        if name == "tied":
            axes = (1,)
        return quantize(leaf, stacked=stacked[path], contracting=axes) if axes else leaf

    base = map_with_path(four_bits, nnx_params(model))
    small = with_nnx_params(model, base)
    adapted = lora_nnx(small, adapter, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, nnx_params(adapted), base)
    merged = with_nnx_params(model, merge_adapter(base, adapter, layouts=layouts))
    np.testing.assert_allclose(run(adapted, inputs), run(merged, inputs), rtol=2e-5, atol=2e-5)
    bare = with_nnx_params(model, map_with_path(lambda _, x: _dense(x), base))
    np.testing.assert_allclose(run(small, inputs), run(bare, inputs), rtol=2e-5, atol=2e-5)


def _dense(leaf):
    return leaf.unbox() if hasattr(leaf, "unbox") else leaf
