"""A real tiny Llama that others trained, and the adapters that PEFT made for it."""

import json

import jax
import jax.numpy as jnp
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


@pytest.fixture(scope="session")
def biased_llama(tmp_path_factory):
    """A random Llama with biases that are not zero: its directory, as read, and its logits."""
    import torch
    import transformers

    from lora_jax import lora_linen
    from lora_jax.models import load_pretrained

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    drawn = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    directory = tmp_path_factory.mktemp("model")
    drawn.save_pretrained(directory)
    pretrained = load_pretrained(directory)
    model = lora_linen(pretrained.module)

    def base(ids):
        run = jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(ids)))
        return directory, pretrained, run

    return base
