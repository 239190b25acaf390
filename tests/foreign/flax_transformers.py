"""Flax models of transformers 4 with adapters: `python flax_transformers.py MODEL`."""

import copy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers as hf

from lora_jax import combine, lora_linen, merge_adapter
from lora_jax._tree import leaves_with_path
from tests.foreign.checks import Model, check, check_training, close

IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = jnp.ones_like(IDS)
PLACES = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
IMAGES = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GPT2 = hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=2, **ENDS)
LLAMA = hf.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, **ENDS)
BERT = hf.BertConfig(**SIZES, max_position_embeddings=64)
VIT = hf.ViTConfig(**SIZES, image_size=8, patch_size=4)
TEXT = (IDS, MASK, PLACES)
MODELS = {
    "gpt2": (hf.FlaxGPT2LMHeadModel, GPT2, TEXT),
    "gpt2-tied": (hf.FlaxGPT2LMHeadModel, GPT2, TEXT),
    "llama": (hf.FlaxLlamaForCausalLM, LLAMA, TEXT),
    "bert": (hf.FlaxBertForMaskedLM, BERT, (IDS, MASK, jnp.zeros_like(IDS), PLACES, None)),
    "vit": (hf.FlaxViTForImageClassification, VIT, (IMAGES,)),
}
"""Class, config, and the module's own arguments."""


def main(name: str) -> None:
    kind, config, inputs = MODELS[name]
    model = kind(config)
    # By PEFT's rule an adapter of the embedding leaves the head alone that shares it, unless it is
    # asked to: merged, that is a model with a head of its own.
    merged, options = model, {}
    if name == "gpt2":
        untied = hf.GPT2Config(**config.to_diff_dict() | {"tie_word_embeddings": False})
        merged = kind(untied, _do_init=False)
    if name == "gpt2-tied":
        options = {"ensure_weight_tying": True}

    def forward(module: Any, params: Any) -> jax.Array:
        return module.apply({"params": params}, *inputs, return_dict=False)[0]

    layouts = lora_linen(model.module).layouts(model.params, *inputs)
    adapted = lora_linen(model.module, layouts=layouts)
    case = Model(
        model.params,
        layouts,
        lambda params: forward(model.module, params),
        lambda params, adapter: forward(adapted, combine(params, adapter)),
        lambda params: forward(merged.module, params),
        options,
    )
    check_layouts(name, case)
    check(case)
    check_training(case)
    if inputs is TEXT:
        check_cache(model, adapted, case, merged)


def check_layouts(name: str, case: Model) -> None:
    """Every matrix of the model is found, with the axes that the model's source has."""
    kernels = {path for path, leaf in leaves_with_path(case.params) if leaf.ndim > 1}
    assert kernels - set(case.used) == (
        {"vit/embeddings/cls_token", "vit/embeddings/position_embeddings"}
        if name == "vit"
        else set()
    )
    for path in case.used:
        layout = case.layouts[path]
        if path.endswith("projection/kernel"):
            assert layout.contracting == (0, 1, 2) and layout.window == (4, 4)
        else:
            turned = name.startswith("gpt2") and path.endswith("kernel")
            assert layout.contracting == ((1,) if turned else (0,)), path


def check_cache(model: Any, adapted: Any, case: Model, merged: Any) -> None:
    """Text read in two parts is the text read at once, and text is generated as by the merge."""
    params = combine(case.params, case.adapter)
    whole, _ = case.run(case.adapter, case.params)
    cache, length = model.init_cache(2, 8), 8

    @jax.jit
    def read(cache: Any, ids: Any, places: Any) -> Any:
        variables = {"params": params, "cache": cache}
        mask = jnp.ones((2, length), jnp.int32)
        out, state = adapted.apply(
            variables, ids, mask, places, return_dict=False, mutable=["cache"]
        )
        return out[0], state["cache"]

    first, cache = read(cache, IDS[:, :3], PLACES[:, :3])
    second, cache = read(cache, IDS[:, 3:], PLACES[:, 3:])
    close(jnp.concatenate([first, second], axis=1), whole)
    # The classes of transformers take a module with adapters for the one they made.
    tuned = copy.copy(model)
    tuned._module, tuned.init_cache = adapted, model.init_cache
    dense = merge_adapter(case.params, case.adapter, layouts=case.layouts)
    own, expected = (
        m.generate(IDS, params=p, max_new_tokens=4, do_sample=False).sequences
        for m, p in ((tuned, params), (merged, dense))
    )
    np.testing.assert_array_equal(own, expected)
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False).sequences
    assert not np.array_equal(own, plain)


if __name__ == "__main__":
    main(sys.argv[1])
