"""One config on one device and on eight: what is exchanged, and what comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from lora_jax import QuantConfig
from lora_jax._errors import InputError
from lora_jax._names import is_kernel
from lora_jax._tree import leaves_with_path
from lora_jax.adapters import delta_spectra
from lora_jax.models import ModelConfig, abstract_params, weight_norms
from lora_jax.models._config_json import config_from_hf
from lora_jax.quant import QuantizedTensor
from lora_jax.train import MeshSection, TrainState, load_config, prepare_abstract, train
from lora_jax.train._mesh import AXES, Needs, mesh_shape
from lora_jax.train._partition import (
    RULES,
    RULES_OF_FULL,
    Partition,
    parts_of_width,
    read_rules,
)

from .on_a_mesh import RUNS, SHAPE

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)


def partition(config=CONFIG, rules=RULES, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Partition(mesh, rules, config)


@pytest.fixture(scope="module")
def directory(base_dir, rows_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mesh")
    config = {
        "model": {"path": str(base_dir)},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "data": {"train": str(rows_file), "max_length": 48, "eval_share": 0.2},
        "train": {"batch_size": 4, "steps": 3, "learning_rate": 1e-3, "tensorboard": False,
                  "samples": 0, "loss_chunk": 64, "warmup": 0.0},
        "output": str(directory / "run"),
    }  # fmt: skip
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    return directory


def run_on_eight(directory, *names):
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "on_a_mesh.py"), str(directory), *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 8
    return found


@pytest.fixture(scope="module")
def on_eight(directory):
    return run_on_eight(directory, "one", "data", "fsdp", "data_fsdp_tensor")


@pytest.fixture(scope="module")
def more_on_eight(directory):
    return run_on_eight(directory, "fsdp_dense", "tensor", "tensor_base", "sequence", "full")


def exchanges(plan, kind):
    return [x for x in plan["compiled"]["collectives"] if x["kind"] == kind]


def test_data_parallel_sums_the_adapters_gradients_and_gathers_nothing(on_eight):
    plan = on_eight["data"]
    assert {x["kind"] for x in plan["compiled"]["collectives"]} == {"all-reduce"}
    summed = sum(x["bytes"] for x in exchanges(plan, "all-reduce"))
    assert 0.99 <= summed / plan["owners"]["gradients"] <= 1.02


def test_fsdp_gathers_codes(on_eight):
    plan = on_eight["fsdp"]
    gathered = exchanges(plan, "all-gather")
    assert {x["dtype"] for x in gathered} == {"u8"}
    # Forward, and once more for the recomputed forward and the backward pass together.
    assert sum(x["bytes"] for x in gathered) <= 0.27 * 2 * 2 * weights_of_kernels()
    assert {x["kind"] for x in plan["compiled"]["collectives"]} == {"all-gather", "all-reduce"}
    summed = sum(x["bytes"] for x in exchanges(plan, "all-reduce"))
    assert summed <= 1.02 * plan["owners"]["gradients"]


def weights_of_kernels():
    params = abstract_params(config_from_hf(SHAPE, "here"))
    layers = leaves_with_path(params["model"]["layers"])
    return sum(x.size for path, x in layers if is_kernel(path))


@pytest.mark.slow
def test_fsdp_gathers_dense_weights_as_often(more_on_eight):
    """A CPU multiplies in float32, and gathers what it has widened."""
    gathered = exchanges(more_on_eight["fsdp_dense"], "all-gather")
    assert sum(x["bytes"] for x in gathered) == 2 * 4 * weights_of_kernels()


@pytest.mark.slow
def test_tensor_parallel_exchanges_what_the_base_does(more_on_eight):
    """With the smallest adapter that lets gradients through all layers, it is the base's."""
    plan, base = more_on_eight["tensor"], more_on_eight["tensor_base"]
    assert {x["kind"] for x in plan["compiled"]["collectives"]} == {"all-reduce"}
    (ours,), (of_base,) = (
        [x for x in exchanges(p, "all-reduce") if x["dtype"] == "f32"] for p in (plan, base)
    )
    assert ours["largest"] == of_base["largest"]
    more = ours["bytes"] - of_base["bytes"] - plan["owners"]["gradients"]
    rows, length, rank, layers, modules = 4, 128, 4, 3, 7
    # Of each module (rows, length, rank) forward, recomputed and backward.
    assert more <= 3 * layers * modules * 4 * rows * length * rank
    assert more < of_base["largest"]


def test_a_device_does_the_same_however_many_there_are(on_eight):
    one, data, fsdp = (on_eight[name] for name in ("one", "data", "fsdp"))
    for plan in (data, fsdp):
        assert plan["flops"] == one["flops"]
        # Gathered codes of a layer are temporaries too.
        most = 1.03 if plan is data else 1.15
        assert plan["compiled"]["temporaries"] <= most * one["compiled"]["temporaries"]
    assert fsdp["owners"]["base"] < 0.5 * one["owners"]["base"]


def test_eight_devices_train_to_what_one_does(directory, on_eight):
    compare_with_one(directory, "data_fsdp_tensor")


def test_eight_devices_tell_the_same_norms_and_why_nobody_was_asked(directory, on_eight):
    run = directory / "data_fsdp_tensor"
    samples = json.loads((run / "samples.json").read_text())
    assert not samples["samples"] and "several devices" in samples["left_out"]
    modules = [x.module for x in delta_spectra(run / "adapter")]
    dense = weight_norms(load_config(run / "config.yaml").model.path, modules)
    norms = json.loads((run / "run.json").read_text())["base_norms"]
    # In four bits, so near those of the file.
    np.testing.assert_allclose([norms[m] for m in modules], [dense[m] for m in modules], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequence", "full"])
def test_more_on_eight_devices_train_to_what_one_does(directory, more_on_eight, name):
    compare_with_one(directory, name)


def compare_with_one(directory, name):
    alone = directory / f"{name}_alone"
    train(load_config(directory / "run.yaml", [*RUNS[name][1], "--output", str(alone)]))
    file = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    one, eight = (load_file(directory / run / file) for run in (alone, name))
    assert one.keys() == eight.keys()
    apart = sum(np.sum(np.square(one[k].astype(np.float64) - eight[k])) for k in one)
    size = sum(np.sum(np.square(one[k].astype(np.float64))) for k in one)
    assert np.sqrt(apart / size) <= 1e-5


def placed(part, quant=None):
    return dict(leaves_with_path(part.put(abstract_params(part.config, quant=quant))))


def specs(leaf):
    return jax.tree.map(lambda x: tuple(x.sharding.spec), leaf)


def test_kernels_are_cut_by_their_axes():
    leaves = placed(partition(fsdp=2, tensor=2))
    attention = "model/layers/self_attn"
    assert specs(leaves[f"{attention}/q_proj/kernel"]) == (None, "fsdp", "tensor")
    assert specs(leaves[f"{attention}/o_proj/kernel"]) == (None, "tensor", "fsdp")
    assert specs(leaves["model/layers/mlp/down_proj/kernel"]) == (None, "tensor", "fsdp")
    assert specs(leaves["model/embed_tokens/embedding"]) == ("tensor", None)
    assert specs(leaves["lm_head/kernel"]) == (None, "tensor")
    assert specs(leaves["model/norm/weight"]) == (None,)
    full = placed(partition(rules=RULES_OF_FULL, fsdp=2))
    assert specs(full["model/embed_tokens/embedding"]) == (None, "fsdp")


def test_quantized_kernels_are_cut_with_their_scales_and_gathered_over_rows_alone():
    leaves = placed(partition(fsdp=2, tensor=2), QuantConfig())
    q = leaves["model/layers/self_attn/o_proj/kernel"]
    assert isinstance(q, QuantizedTensor)
    assert specs(q.codes) == (None, "tensor", None, "fsdp")
    assert specs(q.scales) == (None, "tensor", "fsdp")
    assert q.in_use == (("tensor",), ())
    assert leaves["model/layers/self_attn/q_proj/kernel"].in_use == ((), ("tensor",))
    assert placed(partition(tensor=2), QuantConfig())["lm_head/kernel"].shape == (512, 256)


def test_into_how_many_parts_fsdp_can_cut():
    assert parts_of_width(abstract_params(CONFIG), CONFIG) == 512
    assert parts_of_width(abstract_params(CONFIG, quant=QuantConfig()), CONFIG) == 512 // 64


def test_few_heads_of_keys_stay_whole():
    leaves = placed(partition(tensor=4))
    assert specs(leaves["model/layers/self_attn/k_proj/kernel"]) == (None, None, None)
    assert specs(leaves["model/layers/self_attn/q_proj/kernel"]) == (None, None, "tensor")


@pytest.mark.parametrize(
    "sizes, quant, message",
    [
        (dict(tensor=3), None, r"tensor is 3, .*lm_head/kernel: its axis 'vocab' has 256 parts; "
                               r"use one of 1, 2, 4, .*mesh.rules.vocab: \[\]"),
        (dict(fsdp=16), QuantConfig(), r"fsdp is 16, which does not divide .*gate_proj/kernel: its"
                                       r" axis 'embed' has 8 parts; use one of 1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named(sizes, quant, message):
    with pytest.raises(InputError, match=message):
        placed(partition(**sizes), quant)


def test_rules_of_the_config():
    assert read_rules({"vocab": []}, full=False)["vocab"] == ()
    assert read_rules({}, full=True)["table_embed"] == ("fsdp",)
    with pytest.raises(InputError, match=r"unknown axis 'vocap' \(did you mean 'vocab'"):
        read_rules({"vocap": []}, full=False)
    with pytest.raises(InputError, match=r"mesh.rules.vocab: unknown axis 'tensors'"):
        read_rules({"vocab": ["tensors"]}, full=False)


def test_moments_are_cut_by_a_rule_of_their_own():
    shape = jax.ShapeDtypeStruct((2, 512, 4), np.float32)
    tree = {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": shape}}}}}
    scalar = jax.ShapeDtypeStruct((), np.int32)
    moments = optax.ScaleByAdamState(scalar, tree, tree)
    state = TrainState(scalar, tree, moments, scalar, scalar, scalar)
    rules = read_rules({"moments": ["fsdp"]}, full=False)

    def first(tree):
        return jax.tree.leaves(tree)[0].spec

    whole, cut = (partition(rules=r, fsdp=2).state(state) for r in (RULES, rules))
    assert (
        first(whole.opt_state.mu)
        == first(whole.trainable)
        == first(cut.trainable)
        == P(*[None] * 3)
    )
    assert first(cut.opt_state.mu) == P(None, None, "fsdp") and cut.opt_state.count.spec == P()


@pytest.mark.parametrize(
    "sequence, message",
    [(5, r"sequence is 5, which does not divide data.max_length 48; set that to 50")],
)
def test_a_row_is_cut_evenly(directory, sequence, message):
    config = load_config(directory / "run.yaml", ["--mesh.sequence", str(sequence)])
    with pytest.raises(InputError, match=message):
        prepare_abstract(config, jax.devices() * sequence)


@pytest.mark.parametrize(
    "given, count, memory, shape",
    [
        ({}, 1, None, (1, 1, 1, 1)),
        ({}, 8, None, (8, 1, 1, 1)),
        ({}, 8, 100, (8, 1, 1, 1)),
        ({}, 8, 60, (1, 8, 1, 1)),
        ({}, 24, 60, (3, 8, 1, 1)),
        ({"tensor": 2}, 8, 60, (4, 1, 1, 2)),
        ({"fsdp": 2}, 8, None, (4, 2, 1, 1)),
        ({"data": 2}, 8, None, (2, 4, 1, 1)),
        ({"data": 2, "fsdp": 2, "sequence": 2}, 8, None, (2, 2, 2, 1)),
    ],
)
def test_what_is_left_open_takes_the_devices_left(given, count, memory, shape):
    """Of 40 bytes of weights in 16 parts."""
    needs = Needs(40, memory, 16)
    assert tuple(mesh_shape(MeshSection(**given), count, needs).values()) == shape


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"tensor": 3},
            r"mesh: tensor 3 make 3, which does not divide the 8 devices; .*1, 2, 4, 8",
        ),
        (
            {"data": 2, "fsdp": 2},
            r"data 2, fsdp 2 make 4 devices, but there are 8; leave mesh.data",
        ),
        ({"data": 16}, r"data 16 make 16, which does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(given, message):
    with pytest.raises(InputError, match=message):
        mesh_shape(MeshSection(**given), 8, Needs())


def test_a_section_is_checked():
    with pytest.raises(InputError, match="mesh.fsdp: must be at least 1, got 0"):
        MeshSection(fsdp=0)
