"""Where qwix, which adapts any Flax model too, gives up; ours are in the files beside this."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.errors import SetAttributeFrozenModuleError

qwix = pytest.importorskip("qwix")

from tests.transform.nnx_models import Stack  # noqa: E402
from tests.transform.test_traps import Einsum, X  # noqa: E402

pytestmark = pytest.mark.oracle


def adapt(model, x, **options):
    """The model as qwix adapts it, made ready as its own documentation has it."""
    how = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0, **options)
    if isinstance(model, nnx.Module):
        return qwix.apply_lora_to_model(model, how, x, rngs=nnx.Rngs(1))
    return qwix.apply_lora_to_model(model, how).init(jax.random.key(0), x)["params"]


def test_a_plain_layer_is_adapted():
    params = adapt(nn.Dense(4), jnp.ones((1, 64)), weight_qtype="nf4", tile_size=64)
    assert {"kernel_lora_a", "kernel_lora_b"} <= params.keys()


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (Einsum(), SetAttributeFrozenModuleError),
        (Stack(nnx.Rngs(0)), IndexError),
    ],
)
def test_models_that_it_cannot_adapt(model, error):
    with pytest.raises(error):
        adapt(model, X)


def test_axes_that_no_tile_divides():
    with pytest.raises(ValueError, match="cannot be tiled"):
        adapt(nn.Dense(4), jnp.ones((1, 96)), weight_qtype="nf4", tile_size=64)
