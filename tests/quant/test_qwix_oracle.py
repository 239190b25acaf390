"""Symmetric int4 against qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

qarray = pytest.importorskip("qwix._src.core.qarray")

from lora_jax import _quant_config  # noqa: E402
from lora_jax.quant import dequantize, quantize  # noqa: E402

pytestmark = pytest.mark.oracle


def test_int4_reads_as_qwix():
    kernel = jax.random.normal(jax.random.key(0), (192, 24))
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(1,), tiled_axes={0: 64})
    expected = qarray.dequantize(qarray.quantize(kernel, how))
    q = quantize(kernel, _quant_config.QuantConfig(format="int4", double_quant=False))
    # A block's most negative value lies between -8 and -7 steps: they round it up, we down.
    step = np.repeat(np.asarray(q.scales), 64, axis=0) / 7.5
    tie = np.abs(np.asarray(kernel) / step + 7.5) < 1e-5
    assert 0 < tie.sum() <= 3 * 24
    difference = np.abs(np.asarray(dequantize(q)) - np.asarray(expected)) / step
    assert difference[~tie].max() < 1e-5
    np.testing.assert_array_less(difference[tie], 1 + 1e-5)
