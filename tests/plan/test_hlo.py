"""Traffic and collectives, read from programs that XLA compiled."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lora_jax.plan._hlo import _group, parse

ROOT = Path(__file__).parents[2]


def program(function, *shapes, donate=()):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return parse(jax.jit(function, donate_argnums=donate).lower(*arrays).compile().as_text())


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda a, b: jnp.sin(a) * b + 1, [(64, 64), (64, 64)]),
        (lambda a: a[:, 3:9] * 2, [(64, 64)]),
        (lambda a: a.sum(0), [(64, 64)]),
    ],
)
def test_straight_code_moves_what_xla_says(function, shapes):
    """XLA's own analysis counts operands and results of a program without loops as we do."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arrays).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert parse(compiled.as_text()).traffic() == pytest.approx(expected, rel=0.02)


def test_a_loop_reads_each_layer_once():
    """Not the whole stack in every turn."""

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    few = program(layers, (8, 64), (4, 64, 64)).traffic()
    many = program(layers, (8, 64), (20, 64, 64)).traffic()
    per_layer = (many - few) / 16
    kernel, carry = 4 * 64 * 64, 4 * 8 * 64
    # A kernel may be copied out of its stack before it is multiplied; the stack is 20 times that.
    assert kernel + 2 * carry <= per_layer <= 3 * kernel + 8 * carry


def test_a_loop_writes_each_row_once():
    def rows(x):
        return jax.lax.scan(lambda x, _: (x + 1, x), x, None, length=50)[1]

    few, many = (50 * 4 * 1024, 50 * 50 * 4 * 1024)
    assert few <= program(rows, (1024,)).traffic() <= 10 * few < many


def test_of_branches_the_least_counts():
    def either(flag, a):
        return jax.lax.cond(flag > 0, lambda a: jnp.sort(a * 3) @ a, lambda a: a, a)

    flag = jax.ShapeDtypeStruct((), jnp.int32)
    a = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    moved = parse(jax.jit(either).lower(flag, a).compile().as_text()).traffic()
    assert moved <= 4 * 512 * 512 * 4


def test_a_scatter_writes_its_updates():
    def rows(table, values):
        return table.at[jnp.array([1, 5])].add(values)

    moved = program(rows, (4096, 64), (2, 64), donate=0).traffic()
    assert moved < 4096 * 64 * 4


def test_what_the_cache_holds_is_not_counted():
    moved = program(lambda a, b: (jnp.sin(a), b + 1), (64, 64), (512, 512))
    assert moved.traffic(cache=64 * 64 * 4) == 2 * (512 * 512 - 64 * 64) * 4
    assert moved.traffic(cache=512 * 512 * 4) == 0


def test_what_a_tpu_holds_on_its_chip_is_not_counted():
    """A loop whose turns its condition tells, slices read from main memory, results in VMEM."""
    layer = 2 * 512 * 64
    read = parse((Path(__file__).parent / "tpu_loop.hlo").read_text())
    counter = 4
    assert read.traffic() - 4 * counter == 4 * layer
    assert read.traffic(cache=layer) == 4 * layer * 3 / 4
    (gathered,) = read.collectives()
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 4, 4 * 4 * layer)
    assert gathered.received == 3 * 4 * layer


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['m'=8] {'m'}", 8),
        ("mesh['m'=2,'n'=4], device_ids=([2,4]T(1,0)) {'m','n'}", 8),
        ("mesh['m'=2,'n'=4] {'n':(1)2}", 2),
        ("{}", None),
    ],
)
def test_sizes_of_groups(groups, size):
    assert _group(f", channel_id=1, replica_groups={groups}, use_global_device_ids=true") == size


DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import dataclasses, json, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lora_jax.plan._hlo import parse

mesh = Mesh(jax.devices(), ("m",))
def shape(spec, *dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

def collectives(function, *shapes):
    found = parse(jax.jit(function).lower(*shapes).compile().as_text()).collectives()
    return [dataclasses.asdict(x) for x in found]

print(json.dumps({
    "sum": collectives(lambda x: x.sum(0), shape(P("m"), 64, 32)),
    "layers": collectives(layers, shape(P(None, "m"), 16, 64), shape(P(None, "m"), 5, 64, 64)),
    "alone": collectives(lambda x: x + 1, shape(P("m"), 64, 32)),
}))
"""


def test_collectives_of_eight_devices():
    """Those of a loop count for each of its turns."""
    run = subprocess.run(
        [sys.executable, "-c", DEVICES], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["alone"] == []
    (summed,) = found["sum"]
    assert (summed["kind"], summed["count"], summed["bytes"]) == ("all-reduce", 1, 4 * 32)
    assert summed["received"] == 7 / 8 * 4 * 32
    assert summed["dtype"] == "f32" and summed["largest"] == 4 * 32
    inside = [x for x in found["layers"] if x["count"] % 5 == 0]
    assert sum(x["bytes"] for x in inside) >= 5 * 4 * 16 * 64 // 8
