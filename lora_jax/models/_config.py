"""The shape of a decoder."""

import dataclasses
import math

from .._errors import InputError
from ._families import FAMILIES, FULL, SLIDING, Family
from ._rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape; the fields carry Llama's names of `config.json` in every family.

    What they say is completed by the family that `model_type` names (`FAMILIES`).

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
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    """What norms add to a mean square, LayerNorms to a variance."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    """The base of layers that see a window, whose positions are never stretched."""
    partial_rotary_factor: float = 1.0
    """Share of a head that turns."""
    no_rope_layers: tuple[int, ...] = ()
    """1 for each layer with rotary positions and 0 for those without; () means all have them."""
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """How many tokens layers with a window see, the own one included."""
    layer_types: tuple[str, ...] = ()
    """`full_attention` or `sliding_attention` for each layer; () means that all see everything."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its root; None means `head_dim`."""
    attn_logit_softcapping: float | None = None
    """c of c·tanh(score / c)."""
    final_logit_softcapping: float | None = None
    use_parallel_residual: bool = False
    """Whether the MLP reads what attention reads, and not attention's sum."""
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        derived = ("num_key_value_heads", "head_dim")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", *derived, "rms_norm_eps", "rope_theta",
                     "partial_rotary_factor"):  # fmt: skip
            value = getattr(self, name)
            if not (value > 0 or (name in derived and value == 0)) or value == math.inf:
                raise InputError(f"model config: {name} must be above 0, got {value!r}")
        for name in ("sliding_window", "rope_local_theta", "query_pre_attn_scalar",
                     "attn_logit_softcapping", "final_logit_softcapping"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"model config: {name} must be above 0 or none, got {value!r}")
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a"
                f" multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if not self.family.positions:
            _check_rotary(self)
        _check_layers(self)

    @property
    def family(self) -> Family:
        """What is particular to its kind of decoder."""
        return FAMILIES[self.model_type]

    @property
    def rotary_width(self) -> int:
        """Entries of a head that turn with the position."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """Tokens of the longest text, as far as a stretch of its positions reaches."""
        own = self.max_position_embeddings
        return self.rope_scaling.reach(own) if self.rope_scaling else own

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """How many tokens each layer sees, None for all; None if all layers see all."""
        if self.sliding_window is None or SLIDING not in self.layer_types:
            return None
        return tuple(self.sliding_window if t == SLIDING else None for t in self.layer_types)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation (none, one or several)."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _check_rotary(config: ModelConfig) -> None:
    width = config.rotary_width
    if width < 2 or width % 2 or width > config.head_dim:
        share = config.partial_rotary_factor
        of = "" if share == 1 else f" times partial_rotary_factor ({share:g})"
        raise InputError(
            f"model config: head_dim{of} must be even for RoPE, got {config.head_dim * share:g}"
        )


def _check_layers(config: ModelConfig) -> None:
    for name, known in (("layer_types", (FULL, SLIDING)), ("no_rope_layers", (0, 1))):
        given = getattr(config, name)
        if given and len(given) != config.num_hidden_layers:
            raise InputError(
                f"model config: {name} is a list of {len(given)}, but there are"
                f" {config.num_hidden_layers} layers"
            )
        if unknown := [x for x in given if x not in known]:
            raise InputError(
                f"model config: {name} holds {unknown[0]!r}; known: {', '.join(map(str, known))}"
            )
