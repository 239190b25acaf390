"""`QuantizedTensor` as a pytree and as a Flax parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lora_jax._config import QuantConfig
from lora_jax.quant import QuantizedTensor, dequantize, quantize


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=[False, True], ids=["absmax", "double"])
def stack(request):
    return quantize(normal(3, 192, 16), QuantConfig(double_quant=request.param), stacked=1)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_passes_through_jit_scan_vmap_and_device_put(stack):
    dense = dequantize(stack)
    assert_same(jax.jit(lambda q: q)(stack), stack)
    assert_same(jax.device_put(stack, jax.devices()[0]), stack)
    np.testing.assert_allclose(jax.vmap(dequantize)(stack), dense, rtol=1e-6, atol=1e-6)
    _, layers = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), None, stack)
    np.testing.assert_allclose(layers, dense, rtol=1e-6, atol=1e-6)
    first = jax.tree.map(lambda x: x[0], stack)
    assert (first.shape, first.ndim) == ((192, 16), 2)
    np.testing.assert_allclose(dequantize(first), dense[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("child", [None, object(), jax.ShapeDtypeStruct((1,), jnp.uint8), "spec"])
def test_rebuilds_with_any_children(stack, child):
    leaves, structure = jax.tree.flatten(stack)
    rebuilt = jax.tree.unflatten(structure, [child] * len(leaves))
    assert isinstance(rebuilt, QuantizedTensor)
    assert rebuilt.codes is child


def test_shape_and_bytes_need_no_arrays(stack):
    shapes = jax.eval_shape(lambda q: q, stack)
    assert shapes.shape == (3, 192, 16)
    assert shapes.nbytes == stack.nbytes == sum(x.nbytes for x in jax.tree.leaves(stack))


def test_axis_metadata(stack):
    assert stack.add_axis(0, {}) is stack
    assert stack.remove_axis(0, {}) is stack
    assert stack.replace_boxed("new") == "new"
    np.testing.assert_array_equal(meta.unbox({"kernel": stack})["kernel"], dequantize(stack))


class Stack(nn.Module):
    """Dense layers under scan and remat, as somebody else would write them."""

    layers: int = 3

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return jnp.tanh(nn.Dense(x.shape[-1], use_bias=False)(x)), None

        scan = nn.scan(
            nn.remat(layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan(self, x, None)[0]


def test_stands_for_a_parameter_in_a_scanned_module():
    model, x = Stack(), normal(5, 96)
    params = model.init(jax.random.key(1), x)["params"]
    kernel = params["Dense_0"]["kernel"]
    q = quantize(kernel, stacked=1)

    def output(kernel, x):
        return model.apply({"params": {"Dense_0": {"kernel": kernel}}}, x)

    np.testing.assert_allclose(output(q, x), output(dequantize(q), x), rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x, q: output(q, x).sum()))(x, q)
    expected = jax.grad(lambda x: output(dequantize(q), x).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_another_shape_is_still_refused():
    with pytest.raises(Exception, match="shape"):
        Stack().apply(
            {"params": {"Dense_0": {"kernel": quantize(normal(3, 96, 64), stacked=1)}}},
            normal(5, 96),
        )
