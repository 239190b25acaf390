"""lora_jax: LoRA and QLoRA for any Flax model, as pure functions.

adapter = init_adapter(key, base_params, LoraConfig(r=8, target_modules=["q_proj"]))
logits = lora_linen(model).apply({"params": combine(base_params, adapter)}, x)
"""

from . import adapters as adapters
from . import models as models
from . import optim as optim
from ._config import LoraConfig as LoraConfig
from ._config import QuantConfig as QuantConfig
from ._errors import InputError as InputError
from ._tree import combine as combine
from ._tree import partition as partition
from .lora import KernelLayout as KernelLayout
from .lora import init_adapter as init_adapter
from .lora import init_loftq as init_loftq
from .lora import init_pissa as init_pissa
from .lora import lora_linear as lora_linear
from .lora import merge_adapter as merge_adapter
from .lora import trainable_mask as trainable_mask
from .lora import unmerge_adapter as unmerge_adapter
from .lora import with_dropout as with_dropout
from .quant import QuantizedTensor as QuantizedTensor
from .quant import dequantize as dequantize
from .quant import quantize as quantize
from .quant import quantized_matmul as quantized_matmul
from .transform import lora_linen as lora_linen
