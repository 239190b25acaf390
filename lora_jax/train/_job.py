"""Everything a run needs before its first step: base, adapter, data, and their counts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._quant_config import QuantConfig
from .._tree import combine, leaves_with_path, map_with_path, tree_bytes
from .._typing import Params
from ..adapters import load_adapter
from ..data import Examples, digest_of
from ..lora import (
    TRAINED,
    Layouts,
    Target,
    find_targets,
    init_with_base,
    is_embedding,
    matched_targets,
    trainable_mask,
)
from ..models import (
    Pretrained,
    add_tokens,
    bundled_model,
    load_pretrained,
    load_without_weights,
    quantize_params,
)
from ..optim._lora_fa import without_lora_a
from ..transform import LoraLinen, lora_linen
from ._config import ModelSection, RunConfig
from ._hosts import agree, agree_on_config
from ._mesh import Needs, device_memory, idle_note, make_mesh
from ._partition import Partition, parts_of_width, read_rules
from ._run_rows import examples_of, rows_of, with_length
from ._start import start_from_data
from ._tokens import with_new_rows, with_tokens_of


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run trains: `combine(base, trainable)` are the model's parameters.

    Leaves are arrays, or their shapes alone where nothing is to be run.
    """

    config: RunConfig
    pretrained: Pretrained
    model: LoraLinen
    base: Params
    trainable: Params
    targets: tuple[Target, ...]
    lora: LoraConfig
    """The adapter's: the run's, or what its start (`eva`) has made of that."""
    partition: Partition | None
    """How all of it is cut over several devices; None on one."""

    @property
    def layouts(self) -> Layouts:
        return self.pretrained.layouts

    @property
    def params(self) -> dict[str, Any]:
        return combine(self.base, self.trainable)

    @property
    def mesh(self) -> Any:
        """The devices, if there are several."""
        return None if self.partition is None else self.partition.mesh

    @property
    def own_rows(self) -> set[int] | None:
        """Which rows of a batch lie on this process's devices; None for all."""
        if self.partition is None or jax.process_count() == 1:
            return None
        return self.partition.own_rows(self.config.train.batch_size)

    def batch(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch's arrays where a step takes them from."""
        return arrays if self.partition is None else self.partition.batch(arrays)

    @property
    def mask(self) -> Callable[[Params], Params]:
        """From the trained tree to booleans: what the optimizer may move."""
        if self.config.train.method == "full":
            return lambda params: map_with_path(lambda path, _: True, params)

        def chosen(params: Params) -> Params:
            return trainable_mask(params, self.lora)

        return without_lora_a(chosen) if self.config.train.optimizer == "lora_fa" else chosen

    def counts(self) -> dict[str, int]:
        """Parameters and bytes: trainable and frozen (four-bit weights counted unpacked)."""
        chosen = dict(leaves_with_path(self.mask(self.trainable)))
        trainable = {path: x for path, x in leaves_with_path(self.trainable) if chosen[path]}
        frozen = [x for _, x in leaves_with_path(self.base)]
        # Of stacked layers, the padding to a common rank is no parameter.
        trains_a = self.config.train.optimizer != "lora_fa"
        adapted = sum(
            sum(t.ranks) * ((trains_a or is_embedding(t.path)) * t.d_in + t.d_out)
            for t in self.targets
        )
        if self.config.lora.use_dora or self.config.lora.lora_bias:
            adapted += sum(t.d_out for t in self.targets for rank in t.ranks if rank)
        of_pairs = tuple(name for name in TRAINED if name != "lora_tokens")
        whole = [x.size for path, x in trainable.items() if not path.endswith(of_pairs)]
        return {
            "trainable": adapted + sum(whole),
            "trainable_bytes": tree_bytes(trainable),
            "frozen": sum(int(np.prod(x.shape)) for x in frozen),
            "frozen_bytes": tree_bytes(frozen),
        }


@dataclasses.dataclass(frozen=True)
class Job(Setup):
    """A run made ready: what it trains, and what on."""

    train: Examples
    eval: Examples
    places: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Where each training row stands in its file."""

    @property
    def notes(self) -> list[str]:
        """What whoever starts the run should know of its rows and its devices."""
        shape = {} if self.mesh is None else self.mesh.shape
        idle = idle_note(self.config.train.batch_size, shape)
        return [*self.train.report.notes, *filter(None, [idle])]


def load_base(section: ModelSection, quant: Any = None, place: Any = None) -> Pretrained:
    """The base of a run, quantized as it is read if `quant` says so, and where `place` says."""
    pretrained = load_pretrained(_directory(section), quant=quant, place=place, **_types(section))
    return add_tokens(pretrained, section.add_tokens)


def _types(section: ModelSection) -> dict[str, Any]:
    return {name: getattr(section, name) for name in ("dtype", "param_dtype", "remat")}


def with_adapter(pretrained: Pretrained, adapter: str | Path | None) -> Params:
    """The base's parameters, with the adapter of a directory laid over them."""
    if adapter is None:
        return pretrained.params
    loaded, _ = load_adapter(adapter, pretrained.params, layouts=pretrained.layouts)
    return combine(pretrained.params, loaded)


def load_tokenizer(section: ModelSection) -> Pretrained:
    """The base of a run without its weights: enough to turn rows into tokens."""
    return add_tokens(load_without_weights(_directory(section)), section.add_tokens)


def _directory(section: ModelSection) -> Path:
    return bundled_model() if section.path == "bundled" else Path(section.path)


def prepare(config: RunConfig) -> Job:
    """Load, quantize, attach and tokenize; nothing is written and no step is run.

    Raises:
        InputError: for whatever in the config does not fit the files it names.
    """
    agree_on_config(config)
    rows, held_out = rows_of(config.data)  # first, since it fails fast
    _check_start(config)
    section, quant = _model_section(config), _quant_as_read(config)
    partition = _partition(config, jax.devices(), device_memory())
    _agree_on_shapes(partition)  # programs that differ would wait for each other forever
    partition = None if partition.mesh.size == 1 else partition
    pretrained = load_base(section, quant, partition and partition.place)
    data = with_length(config.data, pretrained)
    examples, held_out = (examples_of(x, data, pretrained) for x in (rows, held_out))
    read = {"rows of data.train": digest_of(examples), "held-out rows": digest_of(held_out)}
    agree({f"the digest of {name}": x for name, x in read.items()}, "give all the same files")
    setup = _set_up(config, pretrained, examples)
    setup = setup if partition is None else _placed(setup, partition)
    return Job(
        **{field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)},
        train=examples,
        eval=held_out,
        places={row.index: row.where for row in rows},
    )


def prepare_abstract(
    config: RunConfig, devices: Sequence[Any] = (), memory: float | None = None
) -> Setup:
    """What a run would train, as shapes: from the model's config alone, with nothing allocated.

    Which layers get which ranks by `eva` only data can tell: here each has its own.

    Args:
        config: The run's.
        devices: Those it would run on, which need not be here; without any, one.
        memory: Bytes of each.

    Raises:
        InputError: for whatever in the config does not fit the model, or the devices.
    """
    setup = _set_up(config, _abstract(config), make=jax.eval_shape)
    return _placed(setup, _partition(config, devices, memory)) if devices else setup


def _abstract(config: RunConfig) -> Pretrained:
    _check_start(config)
    section, quant = _model_section(config), _quant_as_read(config)
    pretrained = load_without_weights(_directory(section), quant=quant, **_types(section))
    return add_tokens(pretrained, section.add_tokens)


def prepare_beside(config: RunConfig, job: Job) -> Job:
    """The job of another config over the base and the rows of one that is ready.

    Only `lora` and `train` may differ, and neither may move the base.

    Raises:
        InputError: for whatever in the config does not fit the model.
    """
    setup = _set_up(config, job.pretrained, job.train)
    setup = setup if job.partition is None else _placed(setup, job.partition)
    own = {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)}
    return dataclasses.replace(job, **own)


def _partition(config: RunConfig, devices: Sequence[Any], memory: float | None) -> Partition:
    """How a run is cut over its devices."""
    full = config.train.method == "full"
    pretrained = _abstract(config)
    # A trained weight has a gradient and two moments beside it.
    weights = tree_bytes(pretrained.params) * (4 if full else 1)
    needs = Needs(weights, memory, parts_of_width(pretrained.params, pretrained.config))
    mesh = make_mesh(config.mesh, devices, needs)
    length, parts = with_length(config.data, pretrained).seq_length, mesh.shape["sequence"]
    if length % parts:
        raise InputError(
            f"mesh: sequence is {parts}, which does not divide data.max_length {length}; set that"
            f" to {-(-length // parts) * parts}"
        )
    return Partition(mesh, read_rules(config.mesh.rules, full), pretrained.config)


def _agree_on_shapes(partition: Partition) -> None:
    """Make sure that all processes have the same model on the same mesh."""
    model = {f"the model's {k}": x for k, x in dataclasses.asdict(partition.config).items()}
    agree(model, "give all processes the same model.path")
    mesh = {f"mesh.{axis}": size for axis, size in partition.mesh.shape.items()}
    agree(mesh, "say how many devices each axis of the mesh has")


def _placed(setup: Setup, partition: Partition) -> Setup:
    """The setup with its arrays, or their shapes, cut over the mesh."""
    base, trainable = partition.put(setup.base), partition.put(setup.trainable)
    return dataclasses.replace(setup, base=base, trainable=trainable, partition=partition)


def _set_up(
    config: RunConfig,
    pretrained: Pretrained,
    examples: Examples | None = None,
    make: Callable[..., Any] = lambda f, *x: f(*x),
) -> Setup:
    config = with_new_rows(_with_targets(config, pretrained), pretrained)
    config = dataclasses.replace(config, data=with_length(config.data, pretrained))
    if config.train.method == "full":
        base, trainable, targets, lora = {}, pretrained.params, (), config.lora
    else:
        config, base, trainable, lora = _adapter(config, pretrained, examples, make)
        pretrained = dataclasses.replace(pretrained, params=base)
        targets = matched_targets(base, lora, layouts=pretrained.layouts)
    model = lora_linen(pretrained.module)
    return Setup(config, pretrained, model, base, trainable, targets, lora, None)


def _model_section(config: RunConfig) -> ModelSection:
    """Weights that are all trained take float32: small updates to 16 bits round away."""
    section = config.model
    if config.train.adapter is not None and not section.add_tokens:
        section = with_tokens_of(section, config.train.adapter)
    if config.train.method == "full" and section.param_dtype is None:
        return dataclasses.replace(section, param_dtype="float32")
    return section


def _with_targets(config: RunConfig, pretrained: Pretrained) -> RunConfig:
    if config.train.method == "full" or config.lora.target_modules is not None:
        return config
    targets = pretrained.config.family.default_targets
    return dataclasses.replace(
        config, lora=dataclasses.replace(config.lora, target_modules=targets)
    )


def _moves_base(config: RunConfig) -> bool:
    own = config.train.method == "lora" and config.train.adapter is None
    return own and config.lora.moves_base


def _quant_as_read(config: RunConfig) -> QuantConfig | None:
    """The quantization of weights as they are read: none where an adapter starts from them."""
    return None if _moves_base(config) else config.quant


def _check_start(config: RunConfig) -> None:
    """Refuse a start whose base, once it is quantized, nobody could make again."""
    if not _moves_base(config):
        return
    init, loftq = config.lora.init_lora_weights, config.lora.loftq_config
    if init == "loftq" and loftq.get("loftq_iter", 1) > 1:
        raise InputError(
            "lora: loftq_config: after more than one loftq_iter the base is another than quant"
            " gives, and no saved adapter could say which; set it to 1"
        )
    if init != "loftq" and config.quant is not None:
        raise InputError(
            f"lora: init_lora_weights={init!r} over a quantized base would train over a base that"
            " no saved adapter could say; use 'loftq', or leave quant out"
        )


def _adapter(
    config: RunConfig, pretrained: Pretrained, examples: Examples | None, make: Callable[..., Any]
) -> tuple[RunConfig, Params, dict[str, Any], LoraConfig]:
    """A new adapter, or the one to go on from (whose own shape then counts), and its base."""
    layouts, params, quant = pretrained.layouts, pretrained.params, config.quant
    if config.train.adapter is not None:
        adapter, lora = load_adapter(config.train.adapter, params, layouts=layouts)
        lora = dataclasses.replace(lora, lora_dropout=config.lora.lora_dropout)
        return dataclasses.replace(config, lora=lora), params, adapter, lora
    lora = config.lora
    _refuse_moved_embeddings(lora, pretrained)
    if lora.starts_from_data and examples is not None:
        return config, *start_from_data(config, pretrained, examples)
    if lora.starts_from_data:  # of which the shapes are those of any start
        lora = lora.with_usual_start()

    def start(key: Any, params: Params) -> tuple[Params, dict[str, Any]]:
        if quant is None or not lora.moves_base:
            return init_with_base(key, params, lora, layouts=layouts)
        own = quant.of(quant.format)
        base, adapter = init_with_base(key, params, lora, own, layouts=layouts)
        return quantize_params(base, quant), adapter

    key = jax.random.key(config.train.seed)
    if lora.moves_base:
        return config, *make(start, key, params), lora
    return config, params, make(lambda *given: start(*given)[1], key, params), lora


def _refuse_moved_embeddings(lora: LoraConfig, pretrained: Pretrained) -> None:
    if not lora.moves_base:
        return
    for target in find_targets(pretrained.params, lora, layouts=pretrained.layouts):
        if is_embedding(target.path):
            raise InputError(
                f"lora: target_modules reaches {target.path}, which PEFT's"
                f" init_lora_weights={lora.init_lora_weights!r} does not move, so that the adapter"
                " could not be saved; take it out, or set init_lora_weights: true"
            )
