"""PEFT's fields and starts that this library has not: what is taken all the same, and why not."""

from collections.abc import Mapping
from typing import Any

UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": (
        (None,),
        "aLoRA, an adapter that acts from certain tokens on; train a plain one",
    ),
    "arrow_config": (
        (None,),
        "Arrow, which routes each token over several adapters; add them by weighted_adapter",
    ),
    "enable_lora": (
        (None, []),
        "a part of merged projections (PEFT 0.2); convert it with the PEFT that wrote it",
    ),
    "kasa_config": (
        (None,),
        "KaSA, which cuts small singular values off the base; use init_lora_weights='pissa'",
    ),
    "layer_replication": (
        (None,),
        "a base with layers repeated; save that base as a model of its own and adapt it",
    ),
    "megatron_config": (
        (None,),
        "Megatron's parallel layers; leave it out, since here arrays carry their own sharding",
    ),
    "monteclora_config": (
        (None,),
        "MonteCLoRA, which samples A; use lora_dropout against overfitting",
    ),
    "runtime_config": (
        (None, {"ephemeral_gpu_offload": False}),
        "how torch moves weights while it loads; leave it out",
    ),
    "use_bdlora": (
        (None, False),
        "BD-LoRA, factors in diagonal blocks; use plain ones of a smaller r",
    ),
    "use_qalora": (
        (False, None),
        "QA-LoRA, which pools inputs for GPTQ; use QLoRA, an adapter over a quantized base",
    ),
    "velora_config": (
        (None,),
        "VeLoRA, which keeps inputs compressed; save memory by remat",
    ),
}
"""Field to the values that ask for nothing, and what any other would ask for."""

UNSUPPORTED_INITS: Mapping[str, str] = {
    "mica": "MiCA, which freezes B at the smallest singular vectors; use 'pissa' or 'orthogonal'",
}
"""Values of PEFT's `init_lora_weights` to what they would ask for."""

WITHOUT_EFFECT: Mapping[str, Any] = {
    "megatron_core": "megatron.core",
    "merge_weights": False,
    "qalora_group_size": 16,
}
"""Fields that do nothing by themselves, whatever they say, with PEFT's default."""

DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
    }
)
"""Facts about a file rather than about the adapter: taken, they change no number."""

_NOT_SAVED = ("enable_lora", "merge_weights", "runtime_config")

PEFT_DEFAULTS = {
    name: value
    for name, value in {
        **{name: values[0] for name, (values, _) in UNSUPPORTED.items()},
        **WITHOUT_EFFECT,
    }.items()
    if name not in _NOT_SAVED
}
"""What a saved config says of fields this library has not."""


def refusal(name: str, value: Any) -> str | None:
    """Why a value of one of PEFT's other fields cannot be had; None where it asks for nothing.

    Example:
        >>> refusal("use_qalora", False), refusal("merge_weights", True)
        (None, None)
        >>> refusal("layer_replication", [[0, 4]])
        'a base with layers repeated; save that base as a model of its own and adapt it'
    """
    if name not in UNSUPPORTED:
        return None
    accepted, why = UNSUPPORTED[name]
    return None if any(value == given for given in accepted) else why
