"""Frozen weights in blocks of four or eight bits: NF4, FP4, int4, int8."""

from ._bitsandbytes import read_bitsandbytes as read_bitsandbytes
from ._bitsandbytes import read_description as read_description
from ._bitsandbytes import split_state as split_state
from ._error import QuantizationError as QuantizationError
from ._error import quantization_error as quantization_error
from ._matmul import PATHS as PATHS
from ._matmul import MatmulPath as MatmulPath
from ._matmul import explain as explain
from ._matmul import quantized_matmul as quantized_matmul
from ._quantize import config_of as config_of
from ._quantize import quantize as quantize
from ._tensor import QuantizedTensor as QuantizedTensor
from ._tensor import ReadAsArray as ReadAsArray
from ._tensor import dequantize as dequantize
from ._tensor import look_up as look_up
from ._tensor import partition_specs as partition_specs
