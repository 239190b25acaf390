"""`quantization_error` against errors computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import QuantConfig
from lora_jax.quant import dequantize, quantization_error, quantize


def test_errors_of_a_stack():
    weight = np.array(jax.random.normal(jax.random.key(0), (2, 130, 6)))
    weight[1, 3, 2] = 50.0
    config = QuantConfig("fp4", double_quant=False)
    error = quantization_error(jnp.asarray(weight), config)
    off = weight - np.asarray(dequantize(quantize(jnp.asarray(weight), config, stacked=1)))
    rms = np.sqrt((off**2).mean(axis=(1, 2)) / (weight**2).mean(axis=(1, 2)))
    np.testing.assert_allclose(error.rms, rms, rtol=1e-5)
    worst = [
        max(
            np.linalg.norm(off[i, start : start + 64, column])
            / np.linalg.norm(weight[i, start : start + 64, column])
            for start in (0, 64, 128)
            for column in range(6)
        )
        for i in range(2)
    ]
    np.testing.assert_allclose(error.worst, worst, rtol=1e-5)
    np.testing.assert_allclose(error.outliers, [0, 1 / (130 * 6)], rtol=1e-6)


def test_zeros_have_no_error():
    error = quantization_error(jnp.zeros((64, 3)), QuantConfig())
    assert [float(x) for x in error] == [0, 0, 0]
