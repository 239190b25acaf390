"""Weights read over a mesh: to the same bits, and by each process only what its devices hold."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import quantize
from lora_jax.models import ModelConfig, save_pretrained
from lora_jax.quant._codebook import CODEBOOKS, GROUP, dynamic_table

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
)
SPOILED = "model.layers.1.mlp.down_proj.weight"
WATCHED = 512 * 512
"""Weights of the tensor whose reading is watched."""


def in_four_bits(tensors):
    """The blocks' kernels as bitsandbytes keeps them, their absmax quantized again."""
    kept = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            kept[name] = tensor
            continue
        q = quantize(np.float32(tensor.T))
        nibbles = np.concatenate([q.codes >> 4, q.codes & 15], axis=1)
        first, second = nibbles.transpose(2, 0, 1).reshape(-1, 2).T
        told = dict(quant_type="nf4", blocksize=64, dtype="bfloat16", shape=tensor.shape)
        told |= dict(nested_blocksize=GROUP, nested_offset=float(q.offset))
        state = {
            "absmax": np.asarray(q.scales).T.reshape(-1),
            "quant_map": np.float32(CODEBOOKS["nf4"]),
            "nested_absmax": np.asarray(q.nested_scales),
            "nested_quant_map": dynamic_table(signed=True),
            "quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(told).encode(), np.uint8),
        }
        kept[name] = (first << 4 | second)[:, None]
        kept |= {f"{name}.{key}": np.ascontiguousarray(value) for key, value in state.items()}
    return kept


def spoiled(tensors):
    """One weight that only the last of eight parts of the rows and columns holds."""
    tensors[SPOILED][-1, -1] = np.nan
    return tensors


@pytest.fixture(scope="module")
def directory(tmp_path_factory, random_params):
    folder = tmp_path_factory.mktemp("placed")
    params = random_params(CONFIG, 0, "bfloat16")
    save_pretrained(folder / "dense", params, CONFIG, dtype="bfloat16")
    for name, change in (("four_bits", in_four_bits), ("spoiled", spoiled)):
        shutil.copytree(folder / "dense", folder / name)
        path = folder / name / "model.safetensors"
        save_file(change(load_file(path)), path)
    return folder


def processes(directory, count):
    """What each of `count` processes with 8 devices in all prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, ROOT / "tests/models/placed.py", directory]
    clusters = [[]] if count == 1 else [[count, i, port] for i in range(count)]
    started = [
        subprocess.Popen(
            [str(x) for x in (*script, *cluster)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for cluster in clusters
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def alone(directory):
    (found,) = processes(directory, 1)
    return found


def test_every_leaf_is_as_asked_for_bit_for_bit(alone):
    assert len(alone["loads"]) == 5
    assert [x for x in alone["loads"] if x["wrong"]] == []


def test_each_range_is_read_once(alone):
    """Eight parts for eight devices."""
    for load in alone["loads"]:
        if load["name"] == "dense":
            assert load["sizes"] == [WATCHED // 8] * 8, load


def test_what_is_not_finite_is_refused_by_name(alone):
    assert f"{SPOILED} holds weights that are not finite" in alone["refusal"]


def test_devices_exchange_no_weights(alone):
    """The absmax of a layer at most: 4 bytes for 64 weights."""
    for cut, collectives in alone["collectives"].items():
        moved = sum(x["bytes"] for x in collectives)
        assert moved <= 2 * 4 * 1024 * 2048 / 64, (cut, collectives)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_their_own_parts(directory, count):
    for found in processes(directory, count):
        assert len(found["loads"]) == 12
        assert [x for x in found["loads"] if x["wrong"]] == []
        assert f"{SPOILED} holds weights that are not finite" in found["refusal"]
        for load in found["loads"]:
            if load["name"] == "dense":
                # One where all devices hold the same.
                parts = (1, 1) if load["cut"] == "whole" else (8, 8 // count)
                assert load["sizes"] == [WATCHED // parts[0]] * parts[1], load
