"""A run, as its YAML file describes it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import yaml

from .._config import LoraConfig
from .._errors import InputError
from .._quant_config import QuantConfig
from ._schema import apply_overrides, read_dataclass, read_yaml, to_plain

LORA_OPTIMIZERS = ("lora_plus", "lora_fa", "riemannian")
"""Those that treat the two factors of an adapter differently, so need one."""
_OPTIONS_OF = {"lora_plus": "lora_plus_ratio", "riemannian": "riemannian_damping"}


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The base: a Hugging Face directory, or `bundled` for the one that comes with us."""

    path: str = "bundled"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations."""
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the dense weights; null keeps the file's, but trains all of them in float32."""
    remat: Literal["everything", "nothing", "dots", "names", "offload"] = "nothing"
    """What the backward pass keeps of a layer beside its input: everything, nothing, its products
    with weights, a few named tensors, or those and the input in the host's memory."""
    add_tokens: list[str] = dataclasses.field(default_factory=list)
    """Texts that become tokens of their own; their rows of embedding and head are trained."""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Rows to train on and rows to measure on."""

    train: str | list[str]
    eval: str | list[str] | None = None
    """Held-out rows; null sets `eval_share` of the training rows aside."""
    eval_share: float = 0.05
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = "auto"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our column names to the file's, `{instruction: question, output: answer}`."""
    template: str = "auto"
    train_on: Literal["answer", "last", "all"] = "answer"
    max_length: int | None = None
    """Tokens in a row of a batch, and the longest sequence; null is 512, or what the model has
    positions for where that is less."""
    packing: bool = True
    train_rows: int | None = None
    """Read at most so many rows."""
    eval_rows: int | None = None
    bad_rows: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"data.max_length: must be at least 2, got {self.max_length}")
        for name in ("train_rows", "eval_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"data.{name}: must be at least 1, got {getattr(self, name)}")
        if self.eval is None and not 0 < self.eval_share <= 0.5:
            raise InputError(
                f"data.eval_share: must be above 0 and at most 0.5, got {self.eval_share}; or"
                " give data.eval"
            )

    @property
    def seq_length(self) -> int:
        """`max_length` of a section that the model is known to."""
        assert self.max_length is not None
        return self.max_length


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How to train."""

    method: Literal["lora", "full"] = "lora"
    adapter: str | None = None
    """Directory of an adapter to go on from, whose own config then counts; null starts anew."""
    steps: int | None = None
    """Optimizer steps; null takes `epochs`."""
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    """Batches whose gradients make one step, weighted by their trained tokens."""
    optimizer: Literal["adamw", "adamw_8bit", "lora_plus", "lora_fa", "riemannian"] = "adamw"
    """`adamw_8bit` keeps 2.03 bytes per trained parameter, the others 8. Those of LoRA are AdamW
    too: with a faster `lora_B`, with `lora_A` frozen, or with each factor scaled by the other."""
    lora_plus_ratio: float = 16.0
    """Learning rate of `lora_B` over that of `lora_A`."""
    riemannian_damping: float = 1e-2
    """Added to the diagonal of each factor's Gram matrix."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory between updates."""
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float | None = 1.0
    seed: int = 0
    start_batches: int = 8
    """Batches at most that a start from data (`eva`, `corda`, `lora_ga`) looks at."""
    log_every: int = 10
    eval_every: int | None = None
    """Steps between measurements; null measures before and after only."""
    save_every: int | None = None
    """Steps between checkpoints; null saves at the end only."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    patience: int | None = None
    """Stop after so many measurements without a better held-out loss, and keep the best."""
    samples: int = 3
    """Held-out prompts that are answered before and after, to be read in the report; 0 is none."""
    tensorboard: bool = True
    loss_chunk: int = 1024
    """Tokens whose logits exist at one time."""
    heartbeat: float = 100.0
    """Seconds within which a process that died is noticed, where several train a run."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "accumulate",
            "start_batches",
            "log_every",
            "keep",
            "loss_chunk",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}: must be at least 1, got {getattr(self, name)}")
        if self.samples < 0:
            raise InputError(f"train.samples: must be at least 0, got {self.samples}")
        for name in ("steps", "eval_every", "save_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"train.{name}: must be at least 1, got {getattr(self, name)}")
        if max(self.steps or 0, self.epochs) >= 2**31:
            raise InputError("train.steps: more than 2^31 steps or epochs; give fewer")
        for name in ("learning_rate", "epochs", "clip_norm", "heartbeat", *_OPTIONS_OF.values()):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"train.{name}: must be a number above 0, got {value}")
        for name, end in (
            ("warmup", 1.0),
            ("weight_decay", math.inf),
            ("beta1", 1.0),
            ("beta2", 1.0),
        ):
            if not 0 <= getattr(self, name) < end:
                got = getattr(self, name)
                raise InputError(f"train.{name}: must be at least 0 and below {end:g}, got {got}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"train.seed: must be from 0 to 2^63 - 1, got {self.seed}")
        if self.patience and not self.eval_every:
            raise InputError("train.patience: needs train.eval_every, the steps between looks")
        for optimizer, name in _OPTIONS_OF.items():
            if getattr(self, name) != getattr(type(self), name) and self.optimizer != optimizer:
                got = self.optimizer
                raise InputError(f"train.{name}: goes with optimizer {optimizer}, got {got}")
        if self.method == "full" and self.optimizer in LORA_OPTIMIZERS:
            got = self.optimizer
            raise InputError(
                f"train.optimizer: {got} goes with method lora, whose factors it scales; use adamw"
                " or adamw_8bit"
            )


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How many devices each axis of the mesh has; their product is all devices there are."""

    data: int | None = None
    """Copies of the model, each with its own rows of a batch; null takes the devices left over."""
    fsdp: int | None = None
    """Parts that weights are cut into, to be gathered where a layer needs them; rows of a batch are
    cut by it too. Null is 1, or what is left over if the weights would fill half of a device."""
    tensor: int = 1
    """Parts of heads, of the MLP's width and of the vocabulary, each computed where it lies."""
    sequence: int = 1
    """Parts of each row's tokens, for long ones."""
    rules: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Axes of parameters that are cut otherwise than by the usual rules, `{vocab: []}`."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor", "sequence"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"mesh.{name}: must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything about a run; what `config.yaml` in its directory holds, resolved.

    Example:
        >>> RunConfig(data=DataSection(train="rows.jsonl"), output="runs/mine").train.method
        'lora'
    """

    data: DataSection
    output: str
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    quant: QuantConfig | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)

    def __post_init__(self) -> None:
        if self.train.method == "full" and self.quant is not None:
            raise InputError("quant: full training needs dense weights; leave the section out")
        if self.train.method == "full" and self.train.adapter is not None:
            raise InputError("train.adapter: goes with method lora; merge the adapter first")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML file and lay `--section.key value` words over it.

    Raises:
        InputError: for a missing file, broken YAML, an unknown key or a wrong value.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "run.yaml")
        ...     _ = path.write_text("data: {train: rows.jsonl}\\noutput: runs/mine\\n")
        ...     load_config(path, ["--lora.r", "4"]).lora.r
        4
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text in UTF-8") from None
    return parse_config(text, overrides or [], str(path))


def parse_config(text: str, overrides: list[str], where: str) -> RunConfig:
    """A config from the text of its file, with `--section.key value` words laid over it.

    Example:
        >>> parse_config("{data: {train: rows.jsonl}, output: runs/mine}", [], "here").output
        'runs/mine'
    """
    raw = read_yaml(text, where)
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must hold sections such as `data:` and `train:`")
    return run_config(raw, overrides, where)


def run_config(raw: dict[Any, Any], overrides: list[str], where: str) -> RunConfig:
    """A config from sections already read, with `--section.key value` words laid over them.

    Example:
        >>> raw = {"data": {"train": "rows.jsonl"}, "output": "runs/mine"}
        >>> run_config(raw, ["--model.remat", "dots"], "here").model.remat
        'dots'
    """
    return read_dataclass(RunConfig, apply_overrides(raw, overrides), where)


def config_text(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back."""
    plain: dict[str, Any] = to_plain(config)
    if config.quant is None:
        del plain["quant"]
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
