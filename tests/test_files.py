import errno
import pickle

import ml_dtypes
import numpy as np
import pytest

from lora_jax import InputError
from lora_jax._files import atomic_directory, atomic_file, open_tensors, write_tensors


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "config.json"
    with atomic_file(path) as temporary:
        temporary.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}"
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("context", [atomic_file, atomic_directory])
def test_a_full_disk_gets_one_line_and_leaves_nothing(tmp_path, context):
    full = pytest.raises(InputError, match="out: cannot write: No space left")
    with full, context(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_whole(tmp_path):
    path = tmp_path / "deep" / "merged"
    with atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "a.txt").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_holds_something_is_never_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path):
        raise AssertionError("the body must not run")
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("a")
    assert (tmp_path / "out" / "a.txt").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_transposed_and_sliced_arrays_come_back_as_they_were(tmp_path, dtype):
    whole = np.arange(24).reshape(4, 6).astype(dtype)
    tensors = {"transposed": whole.T, "sliced": whole[::2, 1::2], "scalar": whole[0, 1]}
    write_tensors(tmp_path / "w.safetensors", tensors)
    with open_tensors(tmp_path / "w.safetensors") as file:
        assert set(file.keys()) == set(tensors)
        for name, array in tensors.items():
            back = file.get_tensor(name)
            assert back.dtype == dtype
            np.testing.assert_array_equal(back, array)


def test_what_is_not_a_whole_safetensors_file_is_refused(tmp_path):
    whole = tmp_path / "w.safetensors"
    write_tensors(whole, {"a": np.ones((8, 8), np.float32)})
    truncated, pickled = tmp_path / "truncated.safetensors", tmp_path / "pickled.safetensors"
    truncated.write_bytes(whole.read_bytes()[:-10])
    pickled.write_bytes(pickle.dumps({"a": 1}))
    for path in (truncated, pickled):
        with pytest.raises(InputError, match="not a whole safetensors file"), open_tensors(path):
            pass
    with pytest.raises(InputError, match="no such file"), open_tensors(tmp_path / "no.safetensors"):
        pass


def test_pickles_are_never_opened(tmp_path):
    class Loud:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = tmp_path / "adapter_model.bin"
    path.write_bytes(pickle.dumps(Loud()))
    with pytest.raises(InputError, match="pickled weights are never opened"), open_tensors(path):
        pass
    assert not (tmp_path / "ran").exists()
