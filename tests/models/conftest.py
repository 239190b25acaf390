"""A tiny model, as parameters and as a directory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from lora_jax.models import CausalLM, ModelConfig, save_pretrained


@pytest.fixture(scope="session")
def config():
    return ModelConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=(2, 3),
    )


@pytest.fixture(scope="session")
def random_params():
    """Parameters of any config, N(0, 0.3²), biases and norms too."""

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def make(config, seed=0, dtype=jnp.float32):
        shapes = jax.eval_shape(CausalLM(config).init, jax.random.key(0), jnp.ones((1, 4), int))
        leaves, structure = jax.tree.flatten(shapes["params"])
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        draws = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, [x.astype(dtype) for x in draws])

    return make


@pytest.fixture(scope="session")
def params(config, random_params):
    return random_params(config)


@pytest.fixture
def model_dir(tmp_path, config, params):
    save_pretrained(tmp_path / "model", params, config, dtype="float32")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def tied(config):
    return dataclasses.replace(config, tie_word_embeddings=True)
