"""Adapters over a base with new tokens, as PEFT and transformers load them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import combine  # noqa: E402
from lora_jax.models import load_pretrained, save_pretrained  # noqa: E402
from lora_jax.train import prepare  # noqa: E402
from lora_jax.train._save import save_result  # noqa: E402

pytestmark = pytest.mark.oracle
FEW = ["<tool>", "</tool>"]
MANY = [*FEW, *(f"<t{i}>" for i in range(60))]


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
    ("tied", "tokens", "lora"),
    [
        (False, FEW, {}),
        (False, MANY, {}),
        (True, MANY, {}),
        (False, MANY, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_logits_of_peft(make_config, base_dir, tied_dir, tmp_path, tied, tokens, lora) -> None:
    directory = tied_dir if tied else base_dir
    config = make_config(
        model={"path": str(directory), "add_tokens": tokens},
        lora={"target_modules": ["q_proj"], **lora},
    )
    job = prepare(config)
    keys = iter(jax.random.split(jax.random.key(1), 99))

    def moved(path, x):
        name = path[-1].key
        still = "scaling" in name or "ids" in name or "tied" in name
        return x if still else x + 0.1 * jax.random.normal(next(keys), x.shape)

    trained = jax.tree_util.tree_map_with_path(moved, job.trainable)
    save_result(job, tmp_path, trained)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = "one<tool>two three</tool> four" + tokens[-1]
    ids = job.pretrained.tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert max(ids) == len(theirs) - 1

    base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    if len(theirs) > base.config.vocab_size:
        base.resize_token_embeddings(len(theirs))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    params = combine(job.base, trained)
    found = jax.jit(job.model.apply)({"params": params}, jnp.asarray([ids]))
    known = slice(None, len(theirs))  # Rows beyond the tokens are nobody's.
    np.testing.assert_allclose(
        found[..., known], wanted[..., known], atol=2e-5 * np.abs(wanted).max()
    )
