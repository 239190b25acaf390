"""What an adapter looks like: `LoraConfig`, in PEFT's field names."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from ._errors import InputError, nearest
from ._start_options import STARTS_FROM_DATA, start_options

# PEFT fields this library does not implement: accepted at these defaults, refused otherwise.
_ONLY_AT_DEFAULT: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_pattern": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16,),
    "runtime_config": (None, {"ephemeral_gpu_offload": False}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
PEFT_DEFAULTS = {
    name: values[0] for name, values in _ONLY_AT_DEFAULT.items() if name != "runtime_config"
}
"""What a saved config says of them; `runtime_config` is never saved."""
# Facts about a file rather than about the adapter: read and carried, they change no number.
_DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
}
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

    Fields of PEFT that are not below are accepted at PEFT's default and refused otherwise.

    Args:
        r: Rank of the adapter.
        lora_alpha: `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
        target_modules: Module names to adapt: a list of names or path suffixes, one regular
            expression that must match the whole dotted path, or `"all-linear"` (every matrix
            but the output head).
        exclude_modules: Names or a regular expression taken out again.
        lora_dropout: Dropout rate on the adapter's input while training.
        use_rslora: Rank-stabilised scaling (Kalajdzievski 2023).
        rank_pattern, alpha_pattern: Path suffix or regular expression to rank or alpha, first
            match wins.
        layers_to_transform: Layer numbers to adapt; all by default.
        modules_to_save: Modules trained in full and saved with the adapter.
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
        bias: Only `"none"`: biases of the base stay frozen.
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
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = dataclasses.field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    bias: str = "none"
    task_type: str | None = None
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _set_names(self, name, single=name != "modules_to_save")
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
            _set_pattern(self, name)
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights",
                     "use_dora"):  # fmt: skip
            object.__setattr__(self, name, _plain(getattr(self, name)))
        _set_layers(self)
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"lora: the rank {name} must be a positive integer, got {rank!r}")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha <= 0:
                raise InputError(f"lora: the alpha {name} must be positive, got {alpha!r}")
        if type(self.lora_dropout) not in (int, float) or not 0.0 <= self.lora_dropout < 1.0:
            raise InputError(f"lora: lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise InputError(f"lora: task_type must be a name, got {self.task_type!r}")
        if self.bias != "none":
            raise InputError(f"lora: bias={self.bias!r} is not supported; use bias='none'")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                got = getattr(self, name)
                raise InputError(f"lora: {name} must be true or false, got {got!r}")
        _check_init(self)
        if self.adapter_dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(
                f"lora: adapter_dtype={self.adapter_dtype!r} is not supported;"
                " use float32, bfloat16 or float16"
            )
        for pattern in (self.target_modules, self.exclude_modules):
            if isinstance(pattern, str):
                _compiled(pattern)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compiled(pattern)

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
    def starts_from_data(self) -> bool:
        """Whether the adapter's start looks at batches of data."""
        return self.init_lora_weights in STARTS_FROM_DATA

    def _key(self) -> tuple[Any, ...]:
        """All fields; patterns in their order, since the first that matches wins."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        ordered = (tuple(v.items()) if isinstance(v, dict) else v for v in values)
        return tuple(tuple(v) if isinstance(v, list) else v for v in ordered)

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


def _own_fields(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields this library implements, once the others are known to change nothing."""
    known = {field.name for field in dataclasses.fields(cls)}
    # First, since another kind of adapter has fields of its own.
    if values.get("peft_type") not in (None, "LORA"):
        kind = values["peft_type"]
        raise InputError(f"lora: peft_type {kind!r} is not supported; only 'LORA' is")
    for name in sorted(values.keys() - known - _DESCRIPTIVE):
        if name not in _ONLY_AT_DEFAULT:
            raise InputError(f"lora: unknown field {name!r}{nearest(name, known)}")
        if not any(values[name] == default for default in _ONLY_AT_DEFAULT[name]):
            raise InputError(f"lora: {name}={values[name]!r} is not supported; leave it out")
    return {name: value for name, value in values.items() if name in known}


def _set_names(config: LoraConfig, field: str, *, single: bool) -> None:
    """Turn a tuple or set of names into the list that files hold, and refuse anything else."""
    value = getattr(config, field)
    if value is None or (single and isinstance(value, str)):
        return
    if not isinstance(value, list | tuple | set) or not all(isinstance(n, str) for n in value):
        or_one = " or one regular expression" if single else ""
        raise InputError(f"lora: {field} must be a list of names{or_one}, got {value!r}")
    names = sorted(value) if isinstance(value, set) else list(value)
    object.__setattr__(config, field, names)


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own, which JSON can hold."""
    is_number = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if is_number else value


def _set_pattern(config: LoraConfig, field: str) -> None:
    """Null is PEFT's word for an empty pattern, or an empty section."""
    value = getattr(config, field)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"lora: {field} must map patterns to numbers, got {value!r}")
    numbers = {pattern: _plain(number) for pattern, number in (value or {}).items()}
    for pattern in numbers:
        if not isinstance(pattern, str):
            raise InputError(f"lora: {field} must map patterns to numbers, got key {pattern!r}")
    object.__setattr__(config, field, numbers)


def _set_layers(config: LoraConfig) -> None:
    value = _plain(config.layers_to_transform)
    several = isinstance(value, list | tuple | set | range | np.ndarray)
    given: Any = value if several else [] if value is None else [value]
    numbers = [_plain(number) for number in given]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"lora: layers_to_transform must be layer numbers, got {value!r}")
    in_order = sorted(numbers) if isinstance(value, set) else numbers
    layers = in_order if several else next(iter(numbers), None)
    object.__setattr__(config, "layers_to_transform", layers)


def _check_init(config: LoraConfig) -> None:
    init, loftq = config.init_lora_weights, config.loftq_config
    named = init in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", str(init))
    if not isinstance(init, bool) and not named:
        raise InputError(
            f"lora: init_lora_weights={init!r} is not supported{nearest(str(init), INITS)}; use"
            f" true, false, {', '.join(INITS)} or pissa_niter_4"
        )
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


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the dotted path."""
    return next((v for pattern, v in patterns.items() if ends_with_pattern(pattern, path)), default)


def ends_with_pattern(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the end of a module path.

    Example:
        >>> ends_with_pattern("q_proj", "layers/0/q_proj"), ends_with_pattern("proj", "q_proj")
        (True, False)
    """
    return bool(re.match(rf"(.*\.)?({pattern})$", path.replace("/", ".")))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora: {pattern!r} is not a regular expression: {error}") from None
