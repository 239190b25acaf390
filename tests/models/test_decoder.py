"""The decoder: packing, caching, depth, dtypes, quantized leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import QuantConfig
from lora_jax._tree import map_with_path
from lora_jax.lora import DECODERS
from lora_jax.models import CausalLM, ModelConfig, init_cache
from lora_jax.models._families import FAMILIES
from lora_jax.quant import QuantizedTensor, dequantize, quantize

apply = jax.jit(
    lambda model, params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs),
    static_argnums=0,
    static_argnames="method",
)
FIRST, SECOND = [5, 6, 7, 8, 9], [20, 21, 22]
PACKED = dict(
    input_ids=jnp.array([[*FIRST, *SECOND, 0, 0]]),
    positions=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]),
    segment_ids=jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]),
)


def test_packed_examples_equal_separate_runs(config, params):
    model = CausalLM(config)
    packed = apply(model, params, **PACKED)
    first = apply(model, params, jnp.array([FIRST]))
    second = apply(model, params, jnp.array([SECOND]))
    np.testing.assert_allclose(packed[:, :5], first, atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:8], second, atol=1e-4)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("segment, others", [(slice(0, 5), SECOND), (slice(5, 8), FIRST)])
def test_no_gradient_crosses_segments(config, params, segment, others):
    """The untied embedding row of a token gets a gradient from its own segment alone."""

    def total(params):
        logits = apply(CausalLM(config), params, **PACKED)
        return jnp.sum(logits[:, segment] ** 2)

    grad = jax.jit(jax.grad(total))(params)["model"]["embed_tokens"]["embedding"]
    assert np.all(np.asarray(grad)[others] == 0.0)
    own = PACKED["input_ids"][0, segment]
    assert np.all(np.abs(np.asarray(grad)[own]).max(axis=1) > 0.0)


def test_later_tokens_change_nothing(config, params):
    model, ids = CausalLM(config), jnp.array([[5, 6, 7, 8]])
    before = apply(model, params, ids)
    after = apply(model, params, ids.at[0, 3].set(40))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.any(before[:, 3] != after[:, 3])


@pytest.mark.parametrize("chunks", [[8], [5, 3], [1] * 8])
def test_cached_logits_equal_uncached(config, params, chunks):
    model = CausalLM(config)
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size)
    expected = apply(model, params, ids)
    cache, start, hidden = init_cache(config, 2, 12, jnp.float32), 0, []
    for size in chunks:
        part, cache = apply(
            model, params, ids[:, start : start + size], cache=cache, method="hidden_states"
        )
        hidden.append(part)
        start += size
    logits = apply(model, params, jnp.concatenate(hidden, 1), method="logits")
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert int(cache.length) == 8


def loss(model, params, ids):
    logits = apply(model, params, ids)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], ids[:, 1:, None], -1)
    return -jnp.mean(picked)


def test_program_size_does_not_depend_on_depth(config):
    def lines(layers):
        model = CausalLM(dataclasses.replace(config, num_hidden_layers=layers), remat="nothing")
        ids = jnp.ones((1, 8), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        step = jax.jit(jax.grad(lambda params, ids: loss(model, params, ids)))
        return len(step.lower(params, ids).as_text().splitlines())

    assert lines(4) == lines(32)


def test_bfloat16_compute_is_near_float32(config, params):
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size)
    expected = apply(CausalLM(config), params, ids)
    got = apply(CausalLM(config, dtype=jnp.bfloat16), params, ids)
    assert got.dtype == jnp.bfloat16
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("remat", ["everything", "nothing"])
def test_quantized_leaf_works_in_plain_apply(config, params, remat):
    """Flax opens the box; inside the scan only one layer is dense at a time."""
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size)

    def four_bit(path, x):
        kernel = path.startswith("model/layers") and path.endswith("kernel")
        return quantize(x, QuantConfig(), stacked=1) if kernel else x

    def dense(path, x):
        return dequantize(x, jnp.float32) if isinstance(x, QuantizedTensor) else x

    quantized = jax.jit(lambda params: map_with_path(four_bit, params))(params)
    model = CausalLM(config, remat=remat)
    got = apply(model, quantized, ids)
    expected = apply(model, jax.jit(lambda tree: map_with_path(dense, tree))(quantized), ids)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert np.any(got != apply(model, params, ids))


def test_the_tables_of_embeddings_agree():
    """`lora` stands below `models` and knows the names of embeddings and heads by itself."""
    known = {(own.table, own.head) for own in DECODERS}
    assert known == {(family.table, family.head) for family in FAMILIES.values()}


def test_layers_that_differ_compile_one_body():
    """A pattern of windows and two rope bases add numbers to the scan, and no second layer."""
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    alike, patterned = (
        ModelConfig(
            **shape, num_hidden_layers=6, head_dim=8, model_type="gemma3_text",
            tie_word_embeddings=True, **options,
        )
        for options in ({}, {"sliding_window": 4, "rope_local_theta": 1e4,
                             "layer_types": ("sliding_attention",) * 5 + ("full_attention",)})
    )  # fmt: skip
    assert patterned.windows == (4, 4, 4, 4, 4, None)
    ids, dots = jnp.ones((1, 8), jnp.int32), []
    for model in (CausalLM(alike), CausalLM(patterned)):
        params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        traced = jax.make_jaxpr(lambda p, m=model: m.apply({"params": p}, ids))(params)
        dots.append(str(traced).count("dot_general"))
    assert dots[0] == dots[1]
