"""Embeddings, and heads that share them, beside PEFT: adapted, trained whole, or in single rows."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_jax import combine, lora_linen, merge_adapter  # noqa: E402
from lora_jax.adapters import load_adapter, save_adapter  # noqa: E402
from lora_jax.models import load_pretrained, save_pretrained  # noqa: E402
from tests import compiled  # noqa: E402

pytestmark = pytest.mark.oracle
IDS = np.arange(2, 26, dtype=np.int32).reshape(2, 12)
CASES = {
    "look-up alone": (True, {"target_modules": ["embed_tokens", "q_proj"]}),
    "look-up alone, dora": (True, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied": (True, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied by the head": (True, {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "tied by pattern": (
        True,
        {"target_modules": "(.*q_proj|lm_head)", "ensure_weight_tying": True},
    ),
    "nothing to tie": (False, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "dora": (False, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "whole, tied": (
        True,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "rows": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 30]}),
    "rows of both, tied": (
        True,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [9, 3]},
            "ensure_weight_tying": True,
        },
    ),
    "rows of both": (
        False,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [5, 4, 9]},
        },
    ),
}


def random_llama(tied):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(shape)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request, tmp_path_factory):
    """A model and an adapter that PEFT made of it, and the same read by us."""
    tied, fields = CASES[request.param]
    directory = tmp_path_factory.mktemp("case")
    model = random_llama(tied)
    model.save_pretrained(directory / "model")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter *= 1.0 + 0.3 * torch.rand_like(parameter)
    model.save_pretrained(directory / "adapter")
    ours = load_pretrained(directory / "model")
    adapter, config = load_adapter(directory / "adapter", ours.params, layouts=ours.layouts)
    return types.SimpleNamespace(
        name=request.param, directory=directory, theirs=model, expected=logits_of(model),
        ours=ours, adapter=adapter, config=config,
    )  # fmt: skip


def close(found, expected, tolerance=1e-5):
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def forward(case, adapter):
    params = combine(case.ours.params, adapter)
    return compiled.apply(lora_linen(case.ours.module), params, jnp.asarray(IDS))


def test_logits(case):
    """Those of PEFT's unmerged model: unless tied, its head reads the plain table."""
    base = compiled.apply(case.ours.module, case.ours.params, jnp.asarray(IDS))
    assert np.abs(base - case.expected).max() > 1e-2 * np.abs(case.expected).max()
    close(forward(case, case.adapter), case.expected)


def test_gradients(case):
    weights = np.random.default_rng(0).normal(size=case.expected.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda adapter: jnp.sum(forward(case, adapter) * weights)))
    found = gradient(case.adapter)
    case.theirs.zero_grad()
    (case.theirs(torch.from_numpy(IDS).long()).logits * torch.from_numpy(weights)).sum().backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad.numpy()
        for name, p in case.theirs.named_parameters()
        if p.requires_grad
    }
    table, head = found["model"].get("embed_tokens", {}), found.get("lm_head", {})
    embed = "model.embed_tokens."
    pairs = {
        ("embedding_lora_A", embed + "lora_embedding_A"): (table, True),
        ("embedding_lora_B", embed + "lora_embedding_B"): (table, True),
        ("embedding_lora_magnitude", embed + "lora_magnitude_vector.weight"): (table, False),
        ("embedding_lora_tokens", embed + "token_adapter.trainable_tokens_delta"): (table, False),
        ("embedding", embed + "modules_to_save.weight"): (table, False),
        ("lora_tokens", "lm_head.token_adapter.trainable_tokens_delta"): (head, False),
        ("lora_magnitude", "lm_head.lora_magnitude_vector.weight"): (head, False),
    }
    compared = 0
    for (ours, key), (leaves, transposed) in pairs.items():
        if key not in theirs:
            continue
        expected = theirs[key].T if transposed else theirs[key]
        # PEFT keeps the tied pair twice, over one storage.
        twin = {
            "embedding_lora_A": "lm_head.lora_B.weight",
            "embedding_lora_B": "lm_head.lora_A.weight",
        }
        if case.config.ensure_weight_tying and twin.get(ours) in theirs:
            expected = expected + theirs[twin[ours]]
        close(leaves[ours], expected, 1e-5)
        compared += 1
    assert compared
    for name in ("lora_token_ids", "embedding_lora_token_ids", "embedding_lora_untied"):
        for leaves in (table, head):
            assert not np.asarray(leaves.get(name, 0.0)).any()


def test_merged_and_read_by_transformers(case):
    """The merged model computes what the unmerged one does, with an untied head where it must."""
    merged = merge_adapter(case.ours.params, case.adapter, layouts=case.ours.layouts)
    out = case.directory / "merged"
    save_pretrained(out, merged, case.ours.config, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    close(logits_of(model), case.expected)
    parted = case.name.startswith("look-up alone") or not CASES[case.name][0]
    assert model.config.tie_word_embeddings is not parted


def test_peft_reads_what_we_save(case):
    directory = case.directory / "ours"
    save_adapter(directory, case.adapter, case.config, layouts=case.ours.layouts)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        case.directory / "model", dtype=torch.float32
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, directory)
    assert not [str(w.message) for w in caught if "keys" in str(w.message)]
    close(logits_of(model), case.expected)


def test_peft_s_own_merge_of_a_look_up_is_another_model():
    """The reason why ours unties the head: theirs moves the head along with the look-up."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["embed_tokens"]
    )
    model = peft.get_peft_model(random_llama(True), config)
    unmerged = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = logits_of(model.merge_and_unload())
    assert np.abs(merged - unmerged).max() > 0.1 * np.abs(unmerged).max()
