"""Names of the Hub: found in its cache, as its own library does, and refused in one line."""

import builtins
import shutil

import pytest

from lora_jax._errors import InputError
from lora_jax._hub import DESCRIPTION, WEIGHTS, local_directory
from lora_jax.models import load_pretrained, load_without_weights

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(base_dir, tmp_path, monkeypatch):
    """A cache that holds the tiny base as `somebody/tiny`, and no network."""
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / COMMIT
    shutil.copytree(base_dir, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("name", ["somebody/tiny", "somebody/tiny@main", f"somebody/tiny@{COMMIT}"])
def test_a_name_is_a_directory(cached, name):
    assert local_directory(name, [*DESCRIPTION, WEIGHTS]).samefile(cached)


def test_models_by_name(cached):
    assert load_pretrained("somebody/tiny").directory.samefile(cached)
    assert load_without_weights("somebody/tiny").tokenizer is not None


def test_a_name_that_the_hub_does_not_give(cached):
    with pytest.raises(InputError, match="somebody/else: no such directory, and the Hub") as error:
        local_directory("somebody/else", [WEIGHTS])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["runs/mine", "./somebody/tiny", "/somebody/x", "a/b/c", "mine"])
def test_paths_stay_paths(cached, path, tmp_path):
    (tmp_path / "runs").mkdir()
    assert str(local_directory(path, [WEIGHTS])) == path.removeprefix("./")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    def without(name, *rest, **options):
        if name == "huggingface_hub":
            raise ImportError(name)
        return original(name, *rest, **options)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"install the extra: pip install 'lora_jax\[hub\]'"):
        load_pretrained("somebody/tiny")
