"""lora_jax: LoRA and QLoRA for any Flax model, as pure functions.

adapter = init_adapter(key, base_params, LoraConfig(r=8, target_modules=["q_proj"]))
logits = lora_linen(model).apply({"params": combine(base_params, adapter)}, x)
"""

import lazy_loader

# What `__init__.pyi` lists, each imported when it is first asked for: a command that needs no JAX
# starts without it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
