"""A decoder's shape from a Hugging Face `config.json`, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._errors import InputError, nearest
from ._activations import ACTIVATIONS
from ._config import ModelConfig
from ._families import FAMILIES, FULL, SLIDING, Family
from ._rope import LongRope, read_rope, write_rope

_OWN = ("rope_scaling", "eos_token_id", "layer_types", "no_rope_layers")
"""Fields that are read by functions of their own."""


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read the content of a Hugging Face `config.json`, of transformers 4 or 5.

    Args:
        raw: The parsed JSON object.
        where: The file's name, for errors.

    Raises:
        InputError: for an unknown `model_type`, a missing field, or a feature that would
            change the numbers and is not supported.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64,
        ...            num_hidden_layers=2, num_attention_heads=4, rope_theta=5e5)
        >>> config_from_hf(raw).rope_theta
        500000.0
    """
    family = _family(raw, where)
    _check_known(raw, family, where)
    rope, local = _rope(raw, where)
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    values = dict(family.defaults)
    for name in fields.keys() - set(_OWN):
        for key in (family.json_names.get(name, name), name):  # some write Llama's names too
            if raw.get(key) is not None:
                values[name] = raw[key]
                break
            if key in raw and name in _MAY_BE_NONE:
                values[name] = None
                break
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is not None:
            values[name] = rope[name]
    if local is not None and local.get("rope_theta") is not None:
        values["rope_local_theta"] = local["rope_theta"]
    own_name = "intermediate_size" in family.json_names  # GPT-2 may leave it to its width
    if own_name and "intermediate_size" not in values and type(values.get("hidden_size")) is int:
        values["intermediate_size"] = 4 * values["hidden_size"]
    values |= family.fixed
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        names = (family.json_names.get(name, name) for name in missing)
        raise InputError(f"{where}: missing {', '.join(names)}")
    values = {name: _typed(name, value, where) for name, value in values.items()}
    if raw.get("eos_token_id") is not None:
        values["eos_token_id"] = read_eos(raw["eos_token_id"], where)
    layers = values["num_hidden_layers"]
    if values.get("sliding_window") is not None:
        values["layer_types"] = _layer_types(raw, family, layers, where)
    if family.no_rope_layers is not None:
        given = raw.get("no_rope_layers") or family.no_rope_layers(raw, layers)
        if not (isinstance(given, list | tuple) and all(type(use) is int for use in given)):
            raise InputError(f"{where}: no_rope_layers must be a list of 0 and 1, got {given!r}")
        values["no_rope_layers"] = tuple(given)
    try:
        config = ModelConfig(**values)
        scaling = read_rope(
            {"original_max_position_embeddings": raw.get("original_max_position_embeddings")}
            | {k: v for k, v in rope.items() if v is not None},
            where,
            theta=config.rope_theta,
            positions=config.max_position_embeddings,
            half=config.rotary_width // 2,
        )
        return dataclasses.replace(config, rope_scaling=scaling)
    except InputError as error:
        raise InputError(str(error).replace("model config", where, 1)) from None


_MAY_BE_NONE = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
)
"""Fields whose `null` says something else than leaving them out."""
_NUMBERS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_NUMBERS += ("rope_local_theta",)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    model_type = raw.get("model_type")
    if model_type not in tuple(FAMILIES):
        known = ", ".join(FAMILIES)
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported"
            f"{nearest(str(model_type), FAMILIES)}; known: {known}"
        )
    return FAMILIES[model_type]


def _check_known(raw: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse what would change the numbers and is not there."""
    key = family.json_names.get("hidden_act", "hidden_act")
    activation = raw.get(key) or raw.get("hidden_act")
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise InputError(
            f"{where}: {key} {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    for name, value in family.only.items():
        if raw.get(name) not in (None, value):
            raise InputError(f"{where}: {name} must be {value!r}, got {raw[name]!r}")
    quantized = raw.get("quantization_config")
    if quantized and not (isinstance(quantized, Mapping) and _is_four_bits(quantized)):
        raise InputError(
            f"{where}: the checkpoint is already quantized ({quantized}), and not by bitsandbytes"
            " to 4 bits; give the float checkpoint and set quant instead"
        )


def _is_four_bits(quantized: Mapping[str, Any]) -> bool:
    by_bitsandbytes = quantized.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return by_bitsandbytes and bool(quantized.get("load_in_4bit"))


def _rope(raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """What is said of positions, and of those of layers with a window where that is apart.

    transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{where}: rope_parameters must be an object, got {rope!r}")
    by_type = {name: rope[name] for name in (FULL, SLIDING) if isinstance(rope.get(name), Mapping)}
    if not by_type:
        return rope, None
    local = by_type.get(SLIDING)
    if local is not None and local.get("rope_type", "default") != "default":
        raise InputError(
            f"{where}: rope_parameters of {SLIDING} must be of type 'default', got"
            f" {local['rope_type']!r}"
        )
    return by_type.get(FULL, {}), local


def _typed(name: str, value: Any, where: str) -> Any:
    """A value of the field's type; a whole number will do for any."""
    default = {f.name: f.default for f in dataclasses.fields(ModelConfig)}[name]
    if name in _MAY_BE_NONE and value is None:
        return None
    kind = int if default in (None, dataclasses.MISSING) else type(default)
    kind = float if name in _NUMBERS else kind
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InputError(f"{where}: {name} must be of type {kind.__name__}, got {value!r}")
    return value if name == "query_pre_attn_scalar" else kind(value)


def _layer_types(
    raw: Mapping[str, Any], family: Family, layers: int, where: str
) -> tuple[str, ...]:
    if family.layer_types is None:
        return ()
    given = raw.get("layer_types")
    if given is None:
        return tuple(family.layer_types(raw, layers))
    if not (isinstance(given, list) and all(isinstance(kind, str) for kind in given)):
        raise InputError(f"{where}: layer_types must be a list of words, got {given!r}")
    return tuple(given)


def read_eos(value: Any, where: str) -> int | tuple[int, ...]:
    """The id or ids that end a text.

    Raises:
        InputError: if it is neither a whole number nor a list of them.

    Example:
        >>> read_eos([1, 2], "config.json")
        (1, 2)
    """
    several = isinstance(value, list | tuple)
    ids = tuple(value) if several else (value,)
    if not all(type(number) is int for number in ids):
        raise InputError(
            f"{where}: eos_token_id must be a token id or a list of them, got {value!r}"
        )
    return ids if several else ids[0]


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 read back; `dtype` names the weights' type."""
    family = config.family
    scaling = write_rope(config.rope_scaling, config.max_position_embeddings)
    raw = dataclasses.asdict(config) | {"rope_scaling": scaling}
    if isinstance(config.rope_scaling, LongRope):
        name = "original_max_position_embeddings"
        raw[name] = getattr(config.rope_scaling, name)
    if config.rope_local_theta is not None or config.partial_rotary_factor != 1:
        raw["rope_parameters"] = _rope_parameters(config)
    unset = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    extra = ("rope_local_theta", "no_rope_layers", "layer_types", "sliding_window",
             "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
             "use_parallel_residual", "partial_rotary_factor")  # fmt: skip
    for name in extra:
        if raw[name] in (unset[name], ()) and name not in family.defaults:
            del raw[name]
    if family.windows_on_request:
        raw["use_sliding_window"] = config.windows is not None
    if family.positions:
        for name in ("rope_theta", "rope_scaling", "head_dim", "num_key_value_heads"):
            raw.pop(name)
    implied = family.layer_types and family.layer_types(raw, config.num_hidden_layers)
    if list(raw.get("layer_types", ())) == implied:
        del raw["layer_types"]  # with such a list a Mistral is another model to transformers
    raw = {family.json_names.get(name, name): value for name, value in raw.items()}
    return raw | {
        "architectures": [family.architecture],
        "torch_dtype": dtype,
        "initializer_range": 0.02,
    }


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """As transformers 5 has them; where transformers 4 looks elsewhere it finds the same."""
    own = write_rope(config.rope_scaling, config.max_position_embeddings)
    own = own or {"rope_type": "default"}
    own |= {"rope_theta": config.rope_theta}
    if config.partial_rotary_factor != 1:
        own |= {"partial_rotary_factor": config.partial_rotary_factor}
    if config.rope_local_theta is None:
        return own
    return {FULL: own, SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_theta}}
