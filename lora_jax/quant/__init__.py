"""Frozen weights in four bits: NF4 and int4 in blocks of 64, with double quantization."""

from ._matmul import quantized_matmul as quantized_matmul
from ._quantize import config_of as config_of
from ._quantize import quantize as quantize
from ._tensor import QuantizedTensor as QuantizedTensor
from ._tensor import dequantize as dequantize
