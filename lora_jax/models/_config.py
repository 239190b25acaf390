"""The shape of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .._errors import InputError, nearest
from ._rope import Llama3Rope, read_rope

KNOWN_MODEL_TYPES = ("llama",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder; the fields carry the names of `config.json`.

    Example:
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> config.head_dim, config.num_key_value_heads
        (8, 4)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    """Heads of keys and values; 0 means one for each query head."""
    head_dim: int = 0
    """Width of a head; 0 means `hidden_size // num_attention_heads`."""
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        derived = ("num_key_value_heads", "head_dim")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", *derived, "rms_norm_eps", "rope_theta"):  # fmt: skip
            value = getattr(self, name)
            if not (value > 0 or (name in derived and value == 0)) or value == math.inf:
                raise InputError(f"model config: {name} must be above 0, got {value!r}")
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a"
                f" multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation (none, one or several)."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


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
    model_type = raw.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported"
            f"{nearest(str(model_type), KNOWN_MODEL_TYPES)}; known: {', '.join(KNOWN_MODEL_TYPES)}"
        )
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{where}: rope_parameters must be an object, got {rope!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act must be 'silu', got {raw['hidden_act']!r}")
    quantized = raw.get("quantization_config")
    if quantized and not (isinstance(quantized, Mapping) and _is_four_bits(quantized)):
        raise InputError(
            f"{where}: the checkpoint is already quantized ({quantized}), and not by bitsandbytes"
            " to 4 bits; give the float checkpoint and set quant instead"
        )
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    own = ("rope_scaling", "eos_token_id")  # read by functions of their own
    values = {k: v for k, v in raw.items() if k in fields and k not in own and v is not None}
    if rope.get("rope_theta") is not None:
        values["rope_theta"] = rope["rope_theta"]
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    for name in values:
        default = fields[name].default
        kind = int if default in (None, dataclasses.MISSING) else type(default)
        if type(values[name]) is not kind and not (kind is float and type(values[name]) is int):
            raise InputError(
                f"{where}: {name} must be of type {kind.__name__}, got {values[name]!r}"
            )
    values["rope_theta"] = float(values.get("rope_theta", 10000.0))
    if raw.get("eos_token_id") is not None:
        values["eos_token_id"] = read_eos(raw["eos_token_id"], where)
    try:
        return ModelConfig(**values, rope_scaling=read_rope(rope, where))
    except InputError as error:
        raise InputError(str(error).replace("model config", where, 1)) from None


def _is_four_bits(quantized: Mapping[str, Any]) -> bool:
    by_bitsandbytes = quantized.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return by_bitsandbytes and bool(quantized.get("load_in_4bit"))


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
    raw = dataclasses.asdict(config)
    scaling = raw.pop("rope_scaling")
    return raw | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_scaling": scaling and {"rope_type": "llama3", **scaling},
        "torch_dtype": dtype,
        "initializer_range": 0.02,
    }
