"""Runs that train an embedding which the head shares, from the config to a merged model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import combine, lora_linen
from lora_jax._merging import merge_directories
from lora_jax.models import load_pretrained, save_pretrained
from lora_jax.train import prepare, prepare_abstract, run
from tests import compiled

IDS = jnp.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def tied_dir(base_dir, tmp_path_factory):
    """The base without its head: the embedding is the head."""
    base = load_pretrained(base_dir)
    directory = tmp_path_factory.mktemp("tied") / "base"
    without = {name: x for name, x in base.params.items() if name != "lm_head"}
    config = dataclasses.replace(base.config, tie_word_embeddings=True)
    save_pretrained(directory, without, config, dtype="float32", tokenizer=base.tokenizer)
    return directory


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        pytest.param(
            {
                "target_modules": ["q_proj"],
                "trainable_token_indices": [5, 40, 41],
                "ensure_weight_tying": True,
            },
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_from_a_config_to_a_merged_model(make_config, tied_dir, tmp_path, lora, tied):
    config = make_config(
        model={"path": str(tied_dir)}, lora={"lora_alpha": 6, **lora}, train={"steps": 2}
    )
    job, planned = prepare(config), prepare_abstract(config)
    assert jax.tree.structure(job.trainable) == jax.tree.structure(planned.trainable)
    extra = 3 * 64 if tied else 4 * (320 + 64)
    assert job.counts()["trainable"] == planned.counts()["trainable"] == 2 * 4 * 128 + extra
    result = run(job)
    before, after = (x["model"]["embed_tokens"] for x in (job.trainable, result.trainable))
    moved = {name for name in after if (after[name] != before[name]).any()}
    trained = {"embedding_lora_tokens"} if tied else {"embedding_lora_A"}
    assert trained <= moved <= {*trained, "embedding_lora_B"}
    params = combine(job.base, result.trainable)
    expected = compiled.apply(lora_linen(job.pretrained.module), params, IDS)
    out = tmp_path / "merged"
    said = merge_directories(
        str(tied_dir), str(result.directory / "adapter"), str(out), "float32", None
    )
    assert "merged in float32" in said
    merged = load_pretrained(out)
    assert merged.config.tie_word_embeddings is tied
    found = compiled.apply(merged.module, merged.params, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
