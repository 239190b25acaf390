"""Models of Tunix with adapters: `python tunix_models.py MODEL`."""

import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lora_jax import (
    KernelLayout,
    lora_nnx,
    merge_adapter,
    nnx_adapter,
    nnx_layouts,
    nnx_params,
    with_nnx_params,
)
from lora_jax._tree import leaves_with_path, tree_from_paths
from tests.foreign.checks import Model, check, check_gradients, close, loss

# Its models need JAX and Flax; what the package itself imports, trainers and data sets, stays out.
spec = importlib.util.find_spec("tunix")
assert spec is not None
sys.modules["tunix"] = importlib.util.module_from_spec(spec)

from tunix.models.gemma import model as gemma  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402

IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PLACES = jnp.broadcast_to(jnp.arange(5), (2, 5))
MASK = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
SIZES = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 16}
LLAMA = {"vocab_size": 64, "num_kv_heads": 2, "rope_theta": 10000, "norm_eps": 1e-5}
GEMMA = {
    "num_embed": 64,
    "attention_types": (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
    "sliding_window_size": 3,
    "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
}
EXPERTS = {"use_tied_embedding": False, "num_experts": 4, "num_experts_per_tok": 2}
REMAT = {"weight_tying": True, "remat_config": llama.RematConfig.BLOCK}
MODELS = {
    "llama": (llama.Llama3, llama.ModelConfig(**SIZES, **LLAMA)),
    "llama-tied": (llama.Llama3, llama.ModelConfig(**SIZES, **LLAMA, **REMAT)),
    "qwen3-experts": (qwen3.Qwen3, qwen3.ModelConfig(**SIZES, **LLAMA, **EXPERTS)),
    "gemma": (gemma.Gemma, gemma.ModelConfig(**SIZES, **GEMMA, num_kv_heads=2)),
    "gemma-fused": (gemma.Gemma, gemma.ModelConfig(**SIZES, **GEMMA, num_kv_heads=4)),
}
AXES = {
    "q_proj/w": (0,),
    "k_proj/w": (0,),
    "v_proj/w": (0,),
    "o_proj/w": (0, 1),
    "q_einsum/w": (1,),
    "kv_einsum/w": (2,),
    "qkv_einsum/w": (2,),
    "attn_vec_einsum/w": (0, 1),
    "lm_head/w": (0,),
    "embedder/input_embedding": (0,),
    "gate_proj/kernel": (0,),
    "up_proj/kernel": (0,),
    "down_proj/kernel": (0,),
    "router/kernel": (0,),
    "mlp/gate_proj": (0,),
    "mlp/up_proj": (0,),
    "mlp/down_proj": (0,),
}
"""The contracted axes, as the equations in the models' sources have them."""


def main(name: str) -> None:
    kind, config = MODELS[name]
    model = with_random_zeros(kind(config, rngs=nnx.Rngs(0)))
    inputs = (IDS, PLACES, None, MASK)
    params, layouts = nnx_params(model), nnx_layouts(model, *inputs)
    assert layouts == {
        path: KernelLayout(
            AXES["/".join(path.split("/")[-2:])], experts=path.split("/")[-2] == "mlp"
        )
        for path, leaf in leaves_with_path(params)
        if leaf.ndim > 1
    }
    case = Model(
        params,
        layouts,
        lambda params: with_nnx_params(model, params)(*inputs)[0],
        lambda params, adapter: lora_nnx(with_nnx_params(model, params), adapter, layouts=layouts)(
            *inputs
        )[0],
    )
    check(case)
    check_loop(model, case, inputs)
    check_cache(model, case)


def with_random_zeros(model: Any) -> Any:
    """Tunix starts its feed-forward layers at zero, which would hide most of a model."""
    noise = jax.random.split(jax.random.key(2), 100)
    leaves = leaves_with_path(nnx_params(model))
    changed = {
        path: jax.random.normal(key, leaf.shape) / 8
        for key, (path, leaf) in zip(noise, leaves, strict=False)
        if not np.any(leaf)
    }
    return with_nnx_params(model, tree_from_paths(changed))


def check_loop(model: Any, case: Model, inputs: Any) -> None:
    """The gradients that NNX's own filters give, and its optimizer."""
    adapted = lora_nnx(model, case.adapter, layouts=case.layouts)
    optimizer = nnx.Optimizer(adapted, optax.adam(3e-2), wrt=nnx.LoRAParam)

    def forward(adapted: Any) -> Any:
        out, _ = adapted(*inputs)
        return loss(out), out

    @nnx.jit
    def step(adapted: Any, optimizer: Any) -> Any:
        trained = nnx.DiffState(0, nnx.LoRAParam)
        (_, out), grads = nnx.value_and_grad(forward, argnums=trained, has_aux=True)(adapted)
        optimizer.update(adapted, grads)
        return out, grads

    first, grads = step(adapted, optimizer)
    own = {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(grads)}
    _, expected = case.run_merged(case.adapter, case.params)
    check_gradients(own, dict(leaves_with_path(expected)))
    for _ in range(5):
        tuned = nnx_adapter(adapted)
        last, _ = step(adapted, optimizer)
    assert loss(last) < 0.9 * loss(first)
    jax.tree.map(np.testing.assert_array_equal, nnx_params(adapted), case.params)
    merged = merge_adapter(case.params, tuned, layouts=case.layouts)
    close(last, jax.jit(case.plain)(merged))


def check_cache(model: Any, case: Model) -> None:
    """Text read in two parts is the text read at once."""
    config, length = model.config, 8
    shape = (2, length, config.num_kv_heads, config.head_dim)
    empty = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(2, jnp.int32)}
    cache = {f"layer_{i}": empty for i in range(config.num_layers)}
    adapted = lora_nnx(model, case.adapter, layouts=case.layouts)

    @nnx.jit
    def read(adapted: Any, cache: Any, ids: Any, places: Any) -> Any:
        return adapted(ids, places, cache, jnp.arange(length) <= places[..., None])

    first, cache = read(adapted, cache, IDS[:, :3], PLACES[:, :3])
    second, cache = read(adapted, cache, IDS[:, 3:], PLACES[:, 3:])
    whole, _ = case.run(case.adapter, case.params)
    close(jnp.concatenate([first, second], axis=1), whole)


if __name__ == "__main__":
    main(sys.argv[1])
