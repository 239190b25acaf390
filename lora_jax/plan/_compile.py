"""A run's train step compiled for a machine that need not be here, and what it will take."""

import dataclasses
import importlib.metadata
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import InputError, first_line
from .._tree import leaves_with_path, tree_bytes
from ..models import NO_FLOAT16
from ..quant import QuantizedTensor
from ..train import RunConfig, Setup, make_program, prepare_abstract
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
    device = _devices(target)[0]
    begin = time.perf_counter()
    setup = prepare_abstract(config)
    step, init = make_program(_without_offload(setup), config.train.steps or STEPS)
    state = jax.eval_shape(init, setup.trainable)
    given = _placed(setup, state, device)
    traced = step.trace(*given)
    counts = count(traced.jaxpr)
    owners = {
        **_base_bytes(setup),
        "adapter": 0 if config.train.method == "full" else tree_bytes(setup.trainable),
        "optimizer": _bytes_on_device(given[0].opt_state),
        "gradients": sum(4 * x.size for x in jax.tree.leaves(setup.trainable)),
        "activations": counts.kept,
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
        },
        "owners": owners,
        "flops": counts.flops,
        "kept_on_host": counts.kept_on_host,
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


def _without_offload(setup: Setup) -> Setup:
    """The same setup, whose state's shapes can be made without any device."""
    train = dataclasses.replace(setup.config.train, offload_optimizer=False)
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train))


def _placed(setup: Setup, state: Any, device: Any) -> tuple[Any, Any, Any]:
    """State, base and batches as shapes on the device; what a config offloads, on its host."""
    c = setup.config
    # A sharding over a mesh, even of one device, tells a traced step which memory an array is in.
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    here = jax.sharding.NamedSharding(mesh, jax.P())
    host = jax.sharding.NamedSharding(mesh, jax.P(), memory_kind="pinned_host")

    def put(x: Any, place: Any = here) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    names = ("input_ids", "positions", "segment_ids")
    types: dict[str, Any] = {**dict.fromkeys(names, jnp.int32), "loss_mask": jnp.bool_}
    shape = (c.train.accumulate, c.train.batch_size, c.data.seq_length)
    batches = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}
    state, base, batches = jax.tree.map(put, (state, setup.base, batches))
    if c.train.offload_optimizer:
        sent = jax.tree.map(lambda x: put(x, host) if x.ndim else x, state.opt_state)
        state = dataclasses.replace(state, opt_state=sent)
    return state, base, batches


def _bytes_on_device(tree: Any) -> int:
    """Without what is placed in the host's memory, which a GPU that is not here does not offer."""
    leaves = jax.tree.leaves(tree)
    return tree_bytes([x for x in leaves if x.sharding.memory_kind != "pinned_host"])


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


def _base_bytes(setup: Setup) -> dict[str, int]:
    """Bytes of the weights: codes and dense arrays, and the scales of the quantized ones."""
    codes = scales = 0
    for leaf in _weights(setup):
        of_codes = tree_bytes(leaf.codes) if isinstance(leaf, QuantizedTensor) else tree_bytes(leaf)
        codes += of_codes
        scales += tree_bytes(leaf) - of_codes
    return {"base": codes, "scales": scales}


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
