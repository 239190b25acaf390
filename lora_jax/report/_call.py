"""`lora_jax.report(params, config)`, although `lora_jax.report` is this package."""

import sys
from types import ModuleType

from ..lora import target_report


class CallablePackage(ModuleType):
    """A package that is called by the name it is imported by."""

    __call__ = staticmethod(target_report)


assert __package__ is not None
sys.modules[__package__].__class__ = CallablePackage
