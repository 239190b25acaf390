"""What an adapter looks like: `LoraConfig`, in PEFT's field names."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from ._config_values import hashable, plain_values
from ._errors import InputError, nearest
from ._peft_fields import DESCRIPTIVE, UNSUPPORTED, UNSUPPORTED_INITS, WITHOUT_EFFECT, refusal
from ._start_options import STARTS_FROM_DATA, start_options

_Class = TypeVar("_Class", bound=type)


def _taking_peft_fields(cls: _Class) -> _Class:
    """Let a constructor take PEFT's other fields too, at their defaults."""
    own: Callable[..., None] = cls.__init__

    @functools.wraps(own)
    def init(self: Any, *args: Any, **values: Any) -> None:
        own(self, *args, **_own_fields(cls, values))

    cls.__init__ = init
    return cls


@_taking_peft_fields
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter `W0 + scaling·A·B`, in PEFT's field names.

    Fields of PEFT that are not below are accepted at PEFT's default and refused otherwise, each
    with its reason.

    Args:
        r: Rank of the adapter.
        lora_alpha: `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
        target_modules: Module names to adapt: a list of names or path suffixes, one regular
            expression that must match the whole dotted path, or `"all-linear"` (every matrix
            but the output head).
        target_parameters: Names or path suffixes of raw parameters to adapt: matrices, and stacks
            of experts `mlp.experts.gate_up_proj`, each expert with a pair of its own (its layout
            says `experts=True`). Parameters of one module stand in the order in which PEFT's
            module declares them. `exclude_modules` and `layers_to_transform` do not apply.
        exclude_modules: Names or a regular expression taken out again.
        lora_dropout: Dropout rate on the adapter's input while training.
        use_rslora: Rank-stabilised scaling (Kalajdzievski 2023).
        rank_pattern, alpha_pattern: Path suffix or regular expression to rank or alpha, first
            match wins.
        layers_to_transform: Layer numbers to adapt; all by default.
        layers_pattern: Name of the list that the numbers count, or several, each a regular
            expression: `"layers"` for `model.layers.0`.  By default any list that lies below
            another module, and of several the first.
        modules_to_save: Modules trained in full and saved with the adapter, by the ends of their
            names, letter by letter as in PEFT: "norm" is "input_layernorm" too.
        trainable_token_indices: Ids of tokens whose rows of the embedding are trained, or a
            mapping from module names to ids.  A head that shares the embedding follows it.
        ensure_weight_tying: Where the output head shares the embedding, whatever adapts or trains
            one does the other.  Without it an adapter on the embedding leaves the head alone.
        init_lora_weights: True: A ~ U(±1/√d_in), B = 0. `"gaussian"`: A ~ N(0, 1/r²), B = 0.
            False: A ~ U(±1/√d_in), B ~ U(±1/√r), so that the adapter changes the output.
            `"orthogonal"`: rows of one orthogonal matrix, A·B = 0. `"pissa"`, `"pissa_niter_4"`
            (randomized, four iterations), `"olora"` and `"loftq"` move the base too: see
            `init_pissa`, `init_olora`, `init_loftq`. `"eva"`, `"corda"` and `"lora_ga"` look at
            data: see `adapters.init_eva`, `init_corda`, `init_lora_ga`.
        loftq_config: `{"loftq_bits": 4, "loftq_iter": 1}`, with `"loftq"` alone.
        eva_config, corda_config, lora_ga_config: Options of the start of that name, PEFT's
            defaults filled in.
        use_dora: Learn each output's magnitude apart from its direction (see `dora_linear`).
        lora_bias: Learn a bias on B too: y = x·W0 + b + scaling·((x·A)·B + bias_B).
        bias: Which biases of the base are trained whole and saved with the adapter: `"none"`,
            `"all"` (every parameter called `bias`), or `"lora_only"` (those of adapted layers).
        fan_in_fan_out: Whether torch keeps the adapted kernels as (d_in, d_out), as GPT-2 does.
            Here all kernels are, and PEFT's A and B have one shape for both: it is read, kept and
            written, and changes no number.
        task_type: Recorded in the file, as PEFT does.
        adapter_dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        InputError: for an unknown or unsupported field, or a value out of its range.

    Example:
        >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).scaling("x/q_proj")
        2.0

    Source: Hu et al. 2021, "LoRA", section 4.1; field names of PEFT's `LoraConfig`.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = dataclasses.field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    task_type: str | None = None
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, value in plain_values(vars(self)).items():
            object.__setattr__(self, name, value)
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"lora: the rank {name} must be a positive integer, got {rank!r}")
            if rank > MOST_RANK:
                raise InputError(
                    f"lora: the rank {name} must be at most {MOST_RANK}, got {rank!r:.40}"
                )
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            # A file may hold an integer that no float is as large as.
            if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
                raise InputError(
                    f"lora: the alpha {name} must be positive and finite, got {alpha!r:.40}"
                )
        if type(self.lora_dropout) not in (int, float) or not 0.0 <= self.lora_dropout < 1.0:
            raise InputError(f"lora: lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise InputError(f"lora: task_type must be a name, got {self.task_type!r}")
        if self.bias not in BIASES:
            raise InputError(
                f"lora: bias must be one of {', '.join(BIASES)}; got {self.bias!r}"
                f"{nearest(str(self.bias), BIASES)}"
            )
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out",
                     "ensure_weight_tying"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                got = getattr(self, name)
                raise InputError(f"lora: {name} must be true or false, got {got!r}")
        _check_init(self)
        _check_parameters(self)
        _check_layers(self)
        if self.adapter_dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(
                f"lora: adapter_dtype={self.adapter_dtype!r} is not supported;"
                " use float32, bfloat16 or float16"
            )
        for pattern in (self.target_modules, self.exclude_modules):
            if isinstance(pattern, str):
                _compiled(pattern)
        layers = self.layers_pattern or []
        layers = [layers] if isinstance(layers, str) else layers
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compiled(pattern, _at_the_end(pattern))
        for pattern in layers:
            _compiled(pattern, layer_number(pattern))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraConfig) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def moves_base(self) -> bool:
        """Whether the adapter starts from a part of the weights that the base then lacks."""
        start = str(self.init_lora_weights).split("_niter_")[0]
        return start in ("pissa", "olora", "loftq", "corda", "lora_ga")

    @property
    def start_can_be_repeated(self) -> bool:
        """Whether the weights alone tell what the start took: PEFT takes it again as it reads."""
        return not self.moves_base or self.init_lora_weights in ("pissa", "olora")

    @property
    def starts_from_data(self) -> bool:
        """Whether the adapter's start looks at batches of data."""
        return self.init_lora_weights in STARTS_FROM_DATA

    def with_usual_start(self) -> "LoraConfig":
        """The config of an adapter that no longer is what a start by name has made of it."""
        if isinstance(self.init_lora_weights, bool):
            return self
        options = dict.fromkeys(f"{name}_config" for name in STARTS_FROM_DATA)
        return dataclasses.replace(self, init_lora_weights=True, loftq_config={}, **options)

    def _key(self) -> tuple[Any, ...]:
        """All fields; patterns in their order, since the first that matches wins."""
        return tuple(hashable(getattr(self, field.name)) for field in dataclasses.fields(self))

    def rank(self, path: str) -> int:
        """Rank at a module path (`/` or `.` between names), after `rank_pattern`."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """Alpha at a module path, after `alpha_pattern`."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def scaling(self, path: str) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` under rsLoRA, at a module path.

        This is the only place where the scaling is computed.
        """
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "lora") -> "LoraConfig":
        """Read a mapping of PEFT fields, such as the content of `adapter_config.json`.

        Args:
            raw: Field names and values.
            where: The place that errors name.

        Example:
            >>> LoraConfig.from_dict({"r": 4, "use_dora": False}).r
            4
        """
        try:
            return cls(**raw)
        except InputError as error:
            raise InputError(str(error).replace("lora:", f"{where}:", 1)) from None


INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", *STARTS_FROM_DATA)
"""Starts of an adapter that `init_lora_weights` names."""
MOST_RANK = 2**16
"""More directions than any matrix has: what a damaged file asks for."""
BIASES = ("none", "all", "lora_only")
"""Biases of the base that an adapter may train."""


def _own_fields(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields this library implements, once the others are known to change nothing."""
    known = {field.name for field in dataclasses.fields(cls)}
    # First, since another kind of adapter has fields of its own.
    if values.get("peft_type") not in (None, "LORA"):
        kind = values["peft_type"]
        raise InputError(
            f"lora: peft_type {kind!r} is not supported: this is no LoRA; train one in its place"
        )
    for name in sorted(values.keys() - known - DESCRIPTIVE - WITHOUT_EFFECT.keys()):
        if name not in UNSUPPORTED:
            near = nearest(name, known | UNSUPPORTED.keys())
            raise InputError(f"lora: unknown field {name!r}{near}")
        if why := refusal(name, values[name]):
            raise InputError(f"lora: {name}={values[name]!r} is not supported: {why}")
    return {name: value for name, value in values.items() if name in known}


def _check_layers(config: LoraConfig) -> None:
    """Refuse choices of layers that contradict the other fields, as PEFT does."""
    if not config.layers_pattern:
        object.__setattr__(config, "layers_pattern", None)
    given = [name for name in ("layers_to_transform", "layers_pattern")
             if getattr(config, name) not in (None, [])]  # fmt: skip
    if given and isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        raise InputError(
            f"lora: {given[0]} goes with a list of target_modules; put the layers into the regular"
            " expression instead"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise InputError(
            f"lora: layers_pattern={config.layers_pattern!r} says what layers_to_transform counts;"
            " give that too, or leave both out for all layers"
        )


def _check_init(config: LoraConfig) -> None:
    init, loftq = config.init_lora_weights, config.loftq_config
    if isinstance(init, str) and init in UNSUPPORTED_INITS:
        why = UNSUPPORTED_INITS[init]
        raise InputError(f"lora: init_lora_weights={init!r} is not supported: {why}")
    named = init in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", str(init))
    if not isinstance(init, bool) and not named:
        raise InputError(
            f"lora: init_lora_weights={init!r} is not supported{nearest(str(init), INITS)}; use"
            f" true, false, {', '.join(INITS)} or pissa_niter_4"
        )
    if config.lora_bias and not isinstance(init, bool):
        raise InputError(
            f"lora: lora_bias goes with init_lora_weights true or false, not {init!r}, which"
            " starts no bias"
        )
    if config.lora_bias and config.use_dora:
        raise InputError("lora: lora_bias does not go with use_dora, which scales whole outputs")
    for name in STARTS_FROM_DATA:
        options = start_options(name, getattr(config, f"{name}_config"), init)
        object.__setattr__(config, f"{name}_config", options)
    ranks = (config.r, *config.rank_pattern.values())
    if init == "orthogonal" and any(rank % 2 for rank in ranks):
        raise InputError(f"lora: init_lora_weights='orthogonal' needs even ranks, got {ranks}")
    if not loftq:
        return
    if init != "loftq":
        raise InputError(f"lora: loftq_config goes with init_lora_weights='loftq', not {init!r}")
    known = {"loftq_bits": (4,), "loftq_iter": range(1, 101)}
    for name, value in loftq.items():
        if name not in known or type(value) is not int or value not in known[name]:
            raise InputError(
                f"lora: loftq_config {name}={value!r} is not supported; use loftq_bits 4 and"
                " loftq_iter from 1 to 100"
            )


def _check_parameters(config: LoraConfig) -> None:
    """Refuse what needs the input or the output of a layer, which a raw parameter has not."""
    for name in ("lora_dropout", "lora_bias"):
        if config.target_parameters and getattr(config, name):
            raise InputError(
                f"lora: {name}={getattr(config, name)!r} does not go with target_parameters, whose"
                " modules do as they like with their input; leave one of the two out"
            )


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the dotted path."""
    return next((v for pattern, v in patterns.items() if ends_with_pattern(pattern, path)), default)


def ends_with_pattern(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the end of a module path.

    Example:
        >>> ends_with_pattern("q_proj", "layers/0/q_proj"), ends_with_pattern("proj", "q_proj")
        (True, False)
    """
    return bool(re.match(_at_the_end(pattern), path.replace("/", ".")))


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def layer_number(pattern: str) -> str:
    """The expression that finds, behind a list's name, the `number` of one of its modules.

    Example:
        >>> re.match(layer_number("layers"), "model.layers.3.mlp")["number"]
        '3'
    """
    return rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


def _compiled(pattern: str, within: str | None = None) -> re.Pattern[str]:
    """A pattern, or the expression that it is a part of."""
    try:
        return re.compile(pattern if within is None else within)
    except re.error as error:
        raise InputError(f"lora: {pattern!r} is not a regular expression: {error}") from None
