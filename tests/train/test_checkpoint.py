"""Checkpoints come back to the bit, on any devices; those that are not whole are known."""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.train._checkpoint import Checkpoints
from lora_jax.train._fingerprint import fingerprints

TREE = {
    "weights": jnp.arange(15.0).reshape(3, 5) / 7,
    "half": jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16),
    "codes": jnp.arange(-4, 4, dtype=jnp.int8),
    "mask": jnp.array([True, False]),
    "count": jnp.int32(7),
    "key": jax.random.key(3),
    "none": None,
}


def plain(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def assert_same(found, tree):
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for one, other in zip(plain(found), plain(tree), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def at_step(step):
    return {**TREE, "count": jnp.int32(step)}


@pytest.fixture
def three(tmp_path):
    """A directory with the checkpoints of steps 1 to 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, at_step(step), {"at": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(directory, tree=TREE):
    checkpoints = Checkpoints(directory, keep=3)
    try:
        return checkpoints.restore(lambda place: tree)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keeps_every_type_to_the_bit(tmp_path, dtype):
    tree = {**TREE, "weights": jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree, {"at": step})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    like = jax.tree.map(jnp.zeros_like, tree)
    saved = checkpoints.restore(lambda place: like if place == {"at": 3} else None)
    checkpoints.close()
    assert saved.step == 3 and saved.place == {"at": 3}
    assert_same(saved.tree, tree)


def test_goes_back_to_the_memory_it_came_from(tmp_path):
    host = jax.device_put(jnp.arange(6.0), jax.memory.Space.Host)
    tree = {"host": host, "device": jnp.arange(6.0), "count": jnp.int32(7)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, tree, {})
    found = checkpoints.restore(lambda place: tree).tree
    checkpoints.close()
    for name, leaf in tree.items():
        assert found[name].sharding.memory_kind == leaf.sharding.memory_kind
        # What a trace goes by.
        assert jax.typeof(found[name]) == jax.typeof(leaf)
        np.testing.assert_array_equal(found[name], leaf)


def test_nothing_saved_is_no_error(tmp_path):
    assert restored(tmp_path) is None


NO_ROOM = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, NO_ROOM),
        ValueError(f"RESOURCE_EXHAUSTED: Error writing: {NO_ROOM} [os_error='28']"),
    ],
)
def test_a_full_disk_in_one_line(tmp_path, message_of, monkeypatch, error):
    import orbax.checkpoint as ocp

    def fail(*args, **options):
        raise error

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, TREE, {})
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        found = message_of(checkpoints.save, 2, TREE, {})
    assert found == f"{tmp_path}: cannot write: No space left on device"
    assert checkpoints.restore(lambda place: TREE).step == 1
    checkpoints.close()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("harm", [truncate, empty, flip, remove])
def test_takes_the_one_before(three, capsys, harm):
    for file in (three / "3" / "state").rglob("*"):
        if file.is_file():
            harm(file)
    saved = restored(three)
    assert saved.step == 2 and saved.place == {"at": 2}
    assert_same(saved.tree, at_step(2))
    said = capsys.readouterr().err
    assert f"{three / '3'}: not whole (" in said and "3.broken; step 2 is taken\n" in said
    assert said.count("\n") == 1
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "3.broken"]


def test_a_changed_place_is_found(three):
    file = three / "3" / "place" / "metadata"
    file.write_text(file.read_text().replace('"at": 3', '"at": 4').replace('"at":3', '"at":4'))
    assert restored(three).step == 2


def test_a_step_that_was_moved_aside_is_saved_again(three):
    for round_ in (1, 2):
        shutil.rmtree(three / "3" / "state")
        checkpoints = Checkpoints(three, keep=2)
        assert checkpoints.restore(lambda place: TREE).step == 2
        checkpoints.save(3, at_step(3), {"at": 3})
        checkpoints.close()
        aside = {p.name for p in three.iterdir()} - {"1", "2", "3"}
        assert aside == {"3.broken", "3.broken-2"} if round_ == 2 else {"3.broken"}
    assert restored(three).step == 3


def test_an_empty_directory_and_half_a_deletion_are_no_checkpoints(three):
    """Orbax deletes old checkpoints file by file."""
    (three / "4").mkdir()
    (three / "1" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(three / "1" / "state")
    checkpoints = Checkpoints(three, keep=2)
    assert checkpoints.restore(lambda place: TREE).step == 3
    checkpoints.save(4, at_step(4), {})
    checkpoints.close()
    assert sorted(p.name for p in three.iterdir()) == ["3", "4", "4.broken"]


def test_none_that_is_whole(three, message_of):
    for step in "123":
        shutil.rmtree(three / step / "place")
    before = sorted(three.rglob("*"))
    found = message_of(restored, three)
    assert f"{three}: none is a whole checkpoint of this run (3: " in found
    assert "; 2: " in found and "; 1: " in found and "bring one back" in found
    assert sorted(three.rglob("*")) == before


@pytest.mark.parametrize(
    "tree, what",
    [
        ({"count": jnp.int32(0)}, r"codes is int8\[8\], here it is missing"),
        ({**TREE, "weights": jnp.zeros((3, 6))}, r"weights is float32\[3, 5\], .* float32\[3, 6\]"),
        ({**TREE, "half": jnp.zeros(8)}, r"half is bfloat16\[8\], here it is float32\[8\]"),
    ],
)
def test_one_of_another_model_is_refused_and_left_alone(three, message_of, tree, what):
    found = message_of(restored, three, tree)
    assert re.search(rf"checkpoints/3: is of another model or adapter: {what}", found)
    assert sorted(path.name for path in three.iterdir()) == ["1", "2", "3"]


@pytest.mark.slow
def test_any_flipped_bit_is_found_or_harmless(three):
    whole = {file: file.read_bytes() for file in (three / "3").rglob("*") if file.is_file()}
    draw = random.Random(0)
    for file, content in whole.items():
        for _ in range(6):
            bit = draw.randrange(8 * len(content))
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            saved = restored(three)
            assert_same(saved.tree, at_step(saved.step))
            assert saved.place == {"at": saved.step}
            shutil.rmtree(three / "3.broken", ignore_errors=True)
            for path, bytes_ in whole.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes_)


NUMPY = {"float32": "uint32", "bfloat16": "uint16", "int8": "uint8", "int32": "uint32"}


@given(st.sampled_from(sorted(NUMPY)), st.data())
def test_any_changed_bit_changes_the_fingerprint(dtype, data):
    bits = np.dtype(NUMPY[dtype])
    word = st.integers(0, np.iinfo(bits).max)
    words = np.array(data.draw(st.lists(word, min_size=12, max_size=12)), bits)
    changed = words.copy()
    at, bit = data.draw(st.integers(0, 11)), data.draw(st.integers(0, 8 * bits.itemsize - 1))
    changed[at] ^= bits.type(1 << bit)
    one, other, again = (
        fingerprints(jnp.asarray(x.view(jnp.dtype(dtype)).reshape(3, 4)))
        for x in (words, changed, words)
    )
    assert one != other and one == again


@given(st.permutations(range(12)))
def test_any_other_order_changes_the_fingerprint(order):
    """Numbers that differ in their highest bit alone too: signs."""
    words = np.array([1.0, -1.0, 2.0, -2.0, 0.0, -0.0, 5, 6, 7, 8, 9, 10], np.float32)
    same = list(order) == list(range(12))
    assert (fingerprints(jnp.asarray(words)) == fingerprints(jnp.asarray(words[order]))) == same


def test_fingerprints_name_leaves_in_order():
    tree = (jnp.arange(4), jnp.arange(4) + 1)
    assert fingerprints(tree) == fingerprints(tree[::-1])[::-1]
    assert len(fingerprints(TREE)) == 6
    assert fingerprints(jax.random.key(1)) != fingerprints(jax.random.key(2))


ON_MESHES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lora_jax.train._checkpoint import Checkpoints
from lora_jax.train._fingerprint import fingerprints

tree = {"w": jnp.arange(64.0).reshape(8, 8), "h": jnp.ones((16,), jnp.bfloat16) / 3,
        "count": jnp.int32(7), "key": jax.random.key(3)}

def on(devices, cut):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    def place(x):
        whole = not cut or jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or not x.ndim
        return jax.device_put(x, NamedSharding(mesh, P() if whole else P("data")))
    return jax.tree.map(place, tree)

layouts = [(devices, cut) for devices in map(int, sys.argv[2:]) for cut in (devices > 1, False)]
for i, layout in enumerate(layouts):
    checkpoints = Checkpoints(Path(sys.argv[1], str(i)), keep=1)
    made = on(*layout)
    assert fingerprints(made) == fingerprints(tree), layout
    checkpoints.save(1, made, {})
    for other in layouts:
        like = jax.tree.map(jnp.copy, on(*other))
        found = checkpoints.restore(lambda place: like).tree
        for name, leaf in like.items():
            assert found[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), (layout, other)
        assert fingerprints(found) == fingerprints(tree), (layout, other)
    checkpoints.close()
print("done")
"""


@pytest.mark.parametrize("devices", ["1 8", pytest.param("1 2 4 8", marks=pytest.mark.slow)])
def test_comes_back_on_any_number_of_devices(tmp_path, monkeypatch, devices):
    eight = "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {eight}")
    done = subprocess.run(
        [sys.executable, "-c", ON_MESHES, str(tmp_path), *devices.split()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
