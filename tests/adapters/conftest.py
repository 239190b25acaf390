"""A real tiny Llama that others trained, and the adapters that PEFT made for it."""

import json

import numpy as np
import pytest

from lora_jax.lora import KernelLayout
from lora_jax.models import load_pretrained

LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}


@pytest.fixture(scope="session")
def stories(data_dir):
    return load_pretrained(data_dir / "stories260K-hf")


@pytest.fixture(scope="session")
def peft_made(data_dir):
    def open_one(name):
        directory = data_dir / "peft_made" / f"stories260K-hf__{name}"
        return directory, np.load(directory / "reference.npz")

    return open_one


@pytest.fixture(scope="session")
def safetensors_shapes():
    """Names and shapes in a file, from its header alone."""

    def read(path):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {key: tuple(entry["shape"]) for key, entry in header.items() if key[0] != "_"}

    return read
