"""A run's train step compiled for a machine that need not be here, and what it will take."""

import dataclasses
import importlib.metadata
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import InputError, first_line
from .._tree import leaves_with_path
from ..models import NO_FLOAT16
from ..quant import QuantizedTensor
from ..train import RunConfig, Setup, idle_note, make_program, prepare_abstract
from ._count import count
from ._hlo import parse
from ._targets import Target, gpu_text

NOT_COMPILED = "not compiled: too large without temporaries"
STEPS = 1000
"""Steps of a run whose config leaves them to its data; they only shape the learning rate."""


def compile_plan(config: RunConfig, target: Target, at_most: float | None = None) -> dict[str, Any]:
    """Compile a config's step for a target and read off what it takes, as plain values.

    What needs more than `at_most` bytes without any temporaries is not compiled.

    Raises:
        InputError: for whatever in the config does not fit the model, and for a compiler that is
            not installed.
    """
    if target.platform == "cpu" and config.model.dtype == "float16":
        raise InputError(f"model.dtype: {NO_FLOAT16}")
    devices = _devices(target)[: target.count]
    begin = time.perf_counter()
    setup = prepare_abstract(config, devices, target.device.memory or None)
    step, init = make_program(setup, config.train.steps or STEPS)
    state = jax.eval_shape(init, setup.trainable)
    given = _placed(setup, state)
    traced = step.trace(*given)
    counts = count(traced.jaxpr)
    mesh = dict(setup.mesh.shape)
    cuts_of_tokens = math.prod(n for axis, n in mesh.items() if axis != "tensor")
    full, trainable = config.train.method == "full", given[0].trainable
    owners = {
        **_base_bytes(trainable if full else given[1]),
        "adapter": 0 if full else _bytes_on_device(trainable),
        "optimizer": _bytes_on_device(given[0].opt_state),
        "gradients": sum(4 * _size_on_device(x) for x in jax.tree.leaves(trainable)),
        # Of what is cut, each device keeps its tokens'; what tensor parts keep is not told apart.
        "activations": counts.kept // cuts_of_tokens,
    }
    floor = sum(owners.values())
    if at_most is not None and floor > at_most:
        made = {"refused": NOT_COMPILED, "total": floor}
    else:
        made = _compiled(traced, target)
    c = setup.config
    return {
        "model": _described(setup),
        "run": {
            "method": c.train.method,
            "batch_size": c.train.batch_size,
            "accumulate": c.train.accumulate,
            "max_length": c.data.seq_length,
            "dtype": c.model.dtype,
            "param_dtype": _param_dtype(setup),
            "remat": c.model.remat,
            "optimizer": c.train.optimizer,
            "offload_optimizer": c.train.offload_optimizer,
            "loss_chunk": c.train.loss_chunk,
            "quant": _quant(setup),
            "attention": setup.pretrained.attention_path,
            "rank": c.lora.r,
            "mesh": mesh,
            "idle": idle_note(c.train.batch_size, mesh),
        },
        "owners": owners,
        "flops": {dtype: n // math.prod(mesh.values()) for dtype, n in counts.flops.items()},
        "kept_on_host": counts.kept_on_host // cuts_of_tokens,
        "compiled": made,
        "files": [str(path) for path in _files(setup)],
        "seconds": time.perf_counter() - begin,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def _devices(target: Target) -> Any:
    """The target's devices, as their compiler describes them."""
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices("cpu")
    if target.platform == "tpu":
        # A chip of this generation has two cores, which JAX drives as one device.
        one = {"chip_config_name": "megacore"} if target.name.startswith("v4") else {}
        # Older compilers know no slice of one chip; a run uses one chip of four alike.
        name = target.name.replace(":1x1", ":2x2")
        return topologies.get_topology_desc(name, "tpu", **one).devices
    __import__("jax_plugins.xla_cuda13")
    return topologies.get_topology_desc(
        "", "cuda", topology=f"1x{target.count}x1", target_config=gpu_text(target.device)
    ).devices


def _placed(setup: Setup, state: Any) -> tuple[Any, Any, Any]:
    """State, base and batches as shapes on their devices; what a config offloads, on the hosts."""
    c, cut = setup.config, setup.partition
    assert cut is not None
    names = ("input_ids", "positions", "segment_ids")
    types: dict[str, Any] = {**dict.fromkeys(names, jnp.int32), "loss_mask": jnp.bool_}
    shape = (c.train.accumulate, c.train.batch_size, c.data.seq_length)
    batches = {name: cut.batch_shape(shape, dtype) for name, dtype in types.items()}
    shardings = cut.state(state, offload=c.train.offload_optimizer)

    def put(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, state, shardings), cut.put(setup.base), batches


def _bytes_on_device(tree: Any) -> int:
    """Bytes of one device's parts, without what is placed in the host's memory.

    A GPU that is not here offers none of that.
    """
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(_size_on_device(x) * x.dtype.itemsize for x in leaves)


def _size_on_device(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))


def _compiled(traced: Any, target: Target) -> dict[str, Any]:
    """What the compiler says of the program, or why it refuses it."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise InputError(f"{target.name}: the compiler fails: {first_line(error)}") from error
        return {"refused": str(error), "total": _needed(str(error))}
    memory, program = compiled.memory_analysis(), parse(compiled.as_text())
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Only a TPU keeps its programs beside the data.
    code = memory.generated_code_size_in_bytes if target.platform == "tpu" else 0
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "total": arguments + temporaries + results + code,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "traffic": program.traffic(target.device.cache),
        "collectives": [dataclasses.asdict(x) for x in program.collectives()],
    }


def _needed(refusal: str) -> int | None:
    """Bytes that a compiler says it would need, which it counts in powers of 1024."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.findall(r"(\d+(?:\.\d+)?)([KMGT])(?:iB)?\b", refusal)
    return round(max((float(x) * units[unit] for x, unit in found), default=0)) or None


def _weights(setup: Setup) -> list[Any]:
    weights = setup.trainable if setup.config.train.method == "full" else setup.base
    return [leaf for _, leaf in leaves_with_path(weights)]


def _param_dtype(setup: Setup) -> str:
    """Type of the dense weights, whether the config or the checkpoint says so."""
    dense = [x for x in _weights(setup) if not isinstance(x, QuantizedTensor)]
    return str(dense[0].dtype)


def _quant(setup: Setup) -> dict[str, Any] | None:
    """How kernels, embedding and head are kept; `stored` if the checkpoint has them so."""
    if setup.config.quant is not None:
        return {**dataclasses.asdict(setup.config.quant), "stored": False}
    stored = [x for x in _weights(setup) if isinstance(x, QuantizedTensor)]
    if not stored:
        return None
    return {"format": stored[0].format, "embedding": None, "head": None, "stored": True}


def _base_bytes(weights: Any) -> dict[str, int]:
    """A device's bytes of the weights: codes and dense arrays, and the scales of quantized ones."""
    leaves = [leaf for _, leaf in leaves_with_path(weights)]
    codes = [leaf.codes if isinstance(leaf, QuantizedTensor) else leaf for leaf in leaves]
    base = _bytes_on_device(codes)
    return {"base": base, "scales": _bytes_on_device(leaves) - base}


def _files(setup: Setup) -> list[Path]:
    """What was read besides the config: the files that a plan stands on."""
    directory, adapter = setup.pretrained.directory, setup.config.train.adapter
    files = [directory / name for name in ("config.json", "generation_config.json")]
    if adapter is not None:
        files += [Path(adapter, "adapter_config.json"), Path(adapter, "adapter_model.safetensors")]
    return files


def _described(setup: Setup) -> dict[str, Any]:
    model, counts = setup.pretrained.config, setup.counts()
    return {
        "path": setup.config.model.path,
        "layers": model.num_hidden_layers,
        "width": model.hidden_size,
        "parameters": counts["frozen"]
        + counts["trainable"] * (setup.config.train.method == "full"),
        "trainable": counts["trainable"],
    }
