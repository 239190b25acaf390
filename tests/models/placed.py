"""Loads a model over 8 devices, of one process or more, and prints as JSON what it found.

    python placed.py DIRECTORY [PROCESSES PROCESS PORT]

DIRECTORY holds `dense`, `four_bits` and `spoiled`, the same model three times.
"""

import dataclasses
import functools
import json
import os
import sys

if __name__ == "__main__":  # not in a process that only looks for tests
    DIRECTORY, *CLUSTER = sys.argv[1:]
    PROCESSES, PROCESS, PORT = map(int, CLUSTER or (1, 0, 0))
    FLAG = f"--xla_force_host_platform_device_count={8 // PROCESSES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402

if __name__ == "__main__" and PROCESSES > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from lora_jax import QuantConfig, quantize  # noqa: E402
from lora_jax._errors import InputError  # noqa: E402
from lora_jax._tree import leaves_with_path  # noqa: E402
from lora_jax.models import _read_placed, load_pretrained  # noqa: E402
from lora_jax.models._checkpoint import Entry  # noqa: E402
from lora_jax.plan._hlo import parse  # noqa: E402
from lora_jax.quant import QuantizedTensor, partition_specs  # noqa: E402

ALL = ("a", "b")
CUTS = {"whole": (None, None), "rows": (ALL, None), "columns": (None, ALL), "both": ("b", "a")}
FORMATS = {
    "dense": None,
    "nf4": QuantConfig(embedding="int8", head="nf4"),
    "int4": QuantConfig("int4", zero_point=True, double_quant=False),
    "int8": QuantConfig("int8", block_size=32),
}
FEW = [
    ("dense", "dense", "both"),
    ("dense", "nf4", "rows", "both"),
    ("dense", "int4", "both"),
    ("four_bits", "dense", "both"),
]
CASES = [
    ("dense", "dense", *CUTS),
    ("dense", "nf4", *CUTS),
    ("dense", "int4", "both"),
    ("dense", "int8", "rows", "columns"),
    ("four_bits", "dense", "both"),
]
WATCHED = "model.layers.1.mlp.up_proj.weight"


@functools.cache
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))


def place(path, leaf, *, rows, columns):
    """Kernels and tables are cut; a quantized one tells so by its dtype, a static field."""
    if isinstance(leaf, QuantizedTensor):
        leaf = dataclasses.replace(leaf, dtype=jnp.dtype("float16"))
        specs = partition_specs(leaf, rows=rows, columns=columns)
    else:
        matrix = leaf.ndim - ("layers" in path) == 2
        cut = (rows, columns) if matrix else (None,)
        specs = PartitionSpec(*[None] * (leaf.ndim - len(cut)), *cut)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh(), spec)
        ),
        leaf,
        specs,
    )


def load(name, quant, cut):
    """The tree, the leaves as they were asked for, and the sizes of what was read of one tensor."""
    asked, sizes, read = {}, [], Entry.read
    rows, columns = CUTS[cut]

    def asking(path, leaf):
        asked[path] = place(path, leaf, rows=rows, columns=columns)
        return asked[path]

    def counting(self, index=None):
        tensor = read(self, index)
        if self.key == WATCHED:
            sizes.append(tensor.size)
        return tensor

    Entry.read = counting
    try:
        with jax.set_mesh(mesh()):
            params = load_pretrained(f"{DIRECTORY}/{name}", quant=quant, place=asking).params
    finally:
        Entry.read = read
    return dict(leaves_with_path(params)), asked, sizes


def differing(got, asked, expected):
    """The paths whose leaf is not as it was asked for, or not bit for bit as without a mesh."""

    def same(got, asked, expected):
        return (
            (got.shape, got.dtype, got.sharding) == (asked.shape, asked.dtype, asked.sharding)
            and got.dtype == expected.dtype
            and all(
                np.array_equal(x.data, np.asarray(expected)[x.index])
                for x in got.addressable_shards
            )
        )

    wrong = []
    for path, leaf in got.items():
        arrays = (jax.tree.leaves(x) for x in (leaf, asked[path], expected[path]))
        structures = [jax.tree.structure(x) for x in (leaf, asked[path])]
        if structures[0] != structures[1] or not all(map(same, *arrays)):
            wrong.append(path)
    return wrong


def loads(cases):
    for name, format, *cuts in cases:
        quant = FORMATS[format]
        expected = load_pretrained(f"{DIRECTORY}/{name}", quant=quant).params
        expected = dict(leaves_with_path(expected))
        for cut in cuts:
            got, asked, sizes = load(name, quant, cut)
            wrong = differing(got, asked, expected)
            yield dict(name=name, format=format, cut=cut, wrong=wrong, sizes=sizes)


def refusal():
    try:
        load("spoiled", QuantConfig(), "rows")
    except InputError as error:
        return str(error)


def collectives(cut):
    """What devices exchange while a layer of 1024 x 2048 is quantized twice over."""
    rows, columns = CUTS[cut]
    shape = jax.ShapeDtypeStruct((2, 1024, 2048), jnp.bfloat16)
    kernel = jax.eval_shape(lambda x: quantize(x, stacked=1), shape)
    leaf = place("kernel", kernel, rows=rows, columns=columns)
    tensor = jax.ShapeDtypeStruct(
        (2048, 1024),
        jnp.bfloat16,
        sharding=NamedSharding(mesh(), PartitionSpec(columns, rows)),
    )
    convert = _read_placed._Conversion(True, QuantConfig(), 1)
    write = _read_placed._writer(convert, tuple(x.sharding for x in jax.tree.leaves(leaf)))
    program = write.lower(jax.tree.leaves(leaf), tensor, (0,)).compile()
    return [dataclasses.asdict(x) for x in parse(program.as_text()).collectives()]


if __name__ == "__main__":
    found = dict(
        loads=list(loads(FEW if PROCESSES == 1 else CASES)),
        refusal=refusal(),
        collectives={cut: collectives(cut) for cut in CUTS} if PROCESSES == 1 else {},
    )
    print(json.dumps(found))
