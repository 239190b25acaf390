"""Single rows of an embedding or a head: outputs, gradients, merging, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    combine,
    init_adapter,
    lora_linen,
    merge_adapter,
    quantize,
    trainable_mask,
    unmerge_adapter,
)
from lora_jax.lora import replace_rows, resize_adapter, scale_adapter
from lora_jax.optim import freeze_base
from tests import compiled

KEY = jax.random.key(0)
IDS = jnp.array([[9, 1, 4], [0, 4, 10]])


class Model(nn.Module):
    tied: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 32, name="wte")
        x = nn.Dense(32, name="q")(table(ids))
        return table.attend(x) if self.tied else nn.Dense(11, name="head")(x)


def start(tied, quantized=False, dtype="float32", **fields):
    model = Model(tied)
    base = jax.tree.map(lambda x: x + 0.1, compiled.init(model, KEY, IDS))
    if quantized:
        config = QuantConfig(block_size=32)
        base["wte"]["embedding"] = quantize(base["wte"]["embedding"], config, contracting=(1,))
        if not tied:
            base["head"]["kernel"] = quantize(base["head"]["kernel"], config)
    tokens = {"wte": [4, 9]} if tied else {"wte": [4, 9], "head": [10, 0, 4]}
    given = {"trainable_token_indices": tokens, "target_modules": ["q"], **fields}
    config = LoraConfig(r=2, init_lora_weights=False, adapter_dtype=dtype, **given)
    return model, base, init_adapter(jax.random.key(1), base, config), config


def trained(adapter):
    def moved(path, x):
        return x + 0.3 if path[-1].key.endswith("lora_tokens") else x

    return jax.tree_util.tree_map_with_path(moved, adapter)


def apply(model, base, adapter):
    return compiled.apply(lora_linen(model), combine(base, adapter), IDS)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_outputs_are_those_of_the_merged_weights(tied, quantized):
    model, base, adapter, _ = start(tied, quantized)
    fresh = {"wte": adapter["wte"]} | ({} if tied else {"head": adapter["head"]})
    unchanged = compiled.apply(lora_linen(model), base, IDS)
    np.testing.assert_allclose(apply(model, base, fresh), unchanged, rtol=0, atol=2e-5)
    adapter = trained(adapter)
    merged = merge_adapter(base, adapter, dtype=jnp.float32)
    expected = compiled.apply(model, merged, IDS)
    assert np.abs(expected - unchanged).max() > 0.1
    scale = np.abs(expected).max()
    np.testing.assert_allclose(apply(model, base, adapter), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_the_rows_and_nothing_as_large_as_the_table(tied):
    model, base, adapter, _ = start(tied)
    adapter = trained(adapter)
    weights = jax.random.normal(KEY, (2, 3, 11))

    def loss(adapter):
        return jnp.sum(weights * jnp.sin(apply(model, base, adapter)))

    found = jax.grad(loss)(adapter)

    def of_merged(adapter):
        dense = merge_adapter(base, adapter)
        return jnp.sum(weights * jnp.sin(compiled.apply(model, dense, IDS)))

    expected = jax.grad(of_merged)(adapter)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * (1 + np.abs(theirs).max()))
    assert found["wte"]["embedding_lora_tokens"].any()
    assert not found["wte"]["embedding_lora_token_ids"].any()
    text = str(jax.make_jaxpr(jax.grad(loss))(adapter))
    # Flax opens every box in `setup` too; what nobody reads (`_`) is never computed.
    lines = [line for line in text.splitlines() if not line.strip().startswith("_:")]
    sums = [line for line in lines if "scatter-add" in line or "add_any" in line]
    assert sums and not any("[11,32]" in line or "[32,11]" in line for line in sums)


def test_a_step_moves_the_rows_and_leaves_their_ids():
    model, base, adapter, config = start(False)
    mask = trainable_mask(adapter, config)
    assert mask["wte"] == {"embedding_lora_tokens": True, "embedding_lora_token_ids": False}
    tx = freeze_base(optax.adamw(0.1, weight_decay=0.5))
    grads = jax.grad(lambda a: apply(model, base, a).sum())(adapter)
    updates, _ = tx.update(grads, tx.init(adapter), adapter)
    after = optax.apply_updates(adapter, updates)
    assert (after["wte"]["embedding_lora_token_ids"] == jnp.array([4, 9])).all()
    assert (after["wte"]["embedding_lora_tokens"] != adapter["wte"]["embedding_lora_tokens"]).any()


def test_a_row_is_found_wherever_it_stands():
    token_ids, tokens = jnp.array([7, 2, 5]), jnp.arange(6.0).reshape(3, 2)
    ids = jnp.arange(10)
    found = replace_rows(ids, -jnp.ones((10, 2)), token_ids, tokens)
    own = dict(zip([7, 2, 5], tokens.tolist(), strict=True))
    assert found.tolist() == [own.get(i, [-1.0, -1.0]) for i in range(10)]


def test_ids_from_the_end_are_looked_up_as_they_are_without():
    model, base, adapter, _ = start(True, trainable_token_indices=[10])
    adapter = trained(adapter)
    table = {"params": combine(base, {"wte": adapter["wte"]})}

    def first(module, ids):
        return nn.Embed(11, 32, name="wte")(ids)

    class Table(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return first(self, ids)

    one, other = (lora_linen(Table()).apply(table, jnp.array([i])) for i in (-1, 10))
    np.testing.assert_array_equal(one, other)


def test_the_rows_keep_the_adapter_s_type_and_the_outputs_the_model_s():
    model, base, adapter, _ = start(False, dtype="bfloat16")
    assert adapter["head"]["lora_tokens"].dtype == jnp.bfloat16
    assert adapter["head"]["lora_token_ids"].dtype == jnp.float32
    assert apply(model, base, adapter).dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": [11]}, "11 is no row of wte/embedding, which has 11"),
        ({"trainable_token_indices": {"heads": [1]}}, "'heads' matches nothing.*'head'"),
        ({"trainable_token_indices": [1], "modules_to_save": ["wte"]}, "trains wte/embedding in"),
        ({"trainable_token_indices": [1], "target_modules": ["wte"]}, "both reach wte/embedding"),
        ({"trainable_token_indices": [3, 3]}, "has 3 twice"),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"trainable_token_indices": [True]}, "must be a list of token ids"),
        ({"trainable_token_indices": 3}, "must be a list of token ids"),
        ({"trainable_token_indices": {3: [1]}}, "must map names to ids"),
        ({"trainable_token_indices": [2**24]}, "must be a list of token ids"),
    ],
)
def test_what_is_refused(fields, words):
    with pytest.raises(InputError, match=words) as error:
        start(False, **fields)
    assert "\n" not in str(error.value)


def test_a_list_is_for_one_embedding():
    base = {"a": {"embedding": jnp.ones((3, 2))}, "b": {"embedding": jnp.ones((3, 2))}}
    base["q"] = {"kernel": jnp.ones((2, 2))}
    config = LoraConfig(r=1, target_modules=["q"], trainable_token_indices=[1])
    with pytest.raises(InputError, match="one embedding of a model, and this has a/emb.*, b/emb"):
        init_adapter(KEY, base, config)
    base["c"] = {"kernel": jnp.ones((2, 2, 2))}
    named = LoraConfig(r=1, target_modules=["q"], trainable_token_indices={"c": [1]})
    with pytest.raises(InputError, match=r"has shape \(2, 2, 2\) and no rows of tokens"):
        init_adapter(KEY, base, named)


def test_an_empty_list_is_none():
    for empty in (None, [], {}, {"wte": []}):
        assert LoraConfig(trainable_token_indices=empty).trainable_token_indices is None
    one = LoraConfig(trainable_token_indices={"wte": (1, np.int64(2))})
    assert one.trainable_token_indices == {"wte": [1, 2]} and isinstance(hash(one), int)


def test_operations_on_an_adapter_with_rows():
    _, base, adapter, config = start(False)
    for operation in (
        lambda: unmerge_adapter(base, adapter),
        lambda: scale_adapter(adapter, 2.0),
    ):
        with pytest.raises(InputError, match="wte/embedding_lora_tokens"):
            operation()
    larger, _ = resize_adapter(adapter, config, 3)
    kept = larger["wte"]["embedding_lora_tokens"]
    np.testing.assert_array_equal(kept, adapter["wte"]["embedding_lora_tokens"])


def test_rows_of_another_base():
    model, base, adapter, _ = start(True)
    wide = combine(adapter, {"wte": {"embedding_lora_tokens": jnp.ones((2, 31))}})
    with pytest.raises(InputError, match=r"lora_tokens \(2, 31\) .* made for another base"):
        apply(model, base, wide)
    del adapter["wte"]["embedding_lora_token_ids"]
    with pytest.raises(InputError, match="lacks wte/embedding_lora_token_ids"):
        apply(model, base, adapter)
    with pytest.raises(InputError, match="wte/embedding_lora_tokens: the base has no parameter"):
        merge_adapter({"q": base["q"]}, {"wte": adapter["wte"]})
