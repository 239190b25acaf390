"""How much a LoRA step costs over the frozen base's own forward and backward to the inputs.

    python experiments/lora_step/run.py [--rounds 16]

8 layers, d 512, ffn 1408, vocabulary 4096, r 8 on all linear layers, 4 x 256 tokens, float32.
Every case runs once per round, in an order that rotates; ratios are taken within a round.
Where other work disturbs the machine, the processor seconds are steadier than the wall.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax.lora._linear as linear
from lora_jax import LoraConfig, combine, init_adapter, lora_linen
from lora_jax.lora import KernelLayout
from lora_jax.models import CausalLM, ModelConfig

BATCH, SEQ, RANK = 4, 256, 8
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
)
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
Step = Callable[[], Any]
Times = tuple[float, float]


def token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean()


def base_step(module: CausalLM, params: Any, ids: jax.Array) -> Step:
    """Forward, and backward to the embeddings: all that a frozen base can cost.

    A zero is added to the embedding table's rows that are looked up, and differentiated.
    """

    def loss(offset, params):
        table = params["model"]["embed_tokens"]["embedding"]
        model = {**params["model"], "embed_tokens": {"embedding": table + offset}}
        return token_loss(module.apply({"params": {**params, "model": model}}, ids), ids)

    offset = jnp.zeros((CONFIG.hidden_size,))
    step = jax.jit(jax.value_and_grad(loss))
    return lambda: step(offset, params)


def lora_step(module: CausalLM, params: Any, ids: jax.Array, adapter: Any) -> Step:
    """A whole training step: loss, gradients of the adapter, AdamW."""
    model, tx = lora_linen(module), optax.adamw(1e-4)

    def loss(adapter, params):
        return token_loss(model.apply({"params": combine(params, adapter)}, ids), ids)

    @jax.jit
    def step(adapter, state, params):
        value, gradients = jax.value_and_grad(loss)(adapter, params)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = tx.init(adapter)
    return lambda: step(adapter, state, params)


def plain_delta(x: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    return (scaling * (x @ a)) @ b


def full_step(module: CausalLM, params: Any, ids: jax.Array) -> Step:
    """Full fine-tuning with the same optimizer."""
    tx = optax.adamw(1e-4)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(
            lambda p: token_loss(module.apply({"params": p}, ids), ids)
        )(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    return lambda: step(params, state)


def qwix_step(module: CausalLM, params: Any, ids: jax.Array) -> Step:
    """The same adapter by qwix."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=2.0 * RANK)
    model = qwix.apply_lora_to_model(module, provider)
    tree = model.init(jax.random.key(1), ids)["params"]
    flat = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def is_lora(path: str) -> bool:
        return "lora" in path

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    values = [flat.get(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    chosen = [value if is_lora(name) else None for name, value in zip(names, values, strict=True)]
    frozen = [None if is_lora(name) else value for name, value in zip(names, values, strict=True)]
    assert sum(x is not None for x in chosen) > 0
    tx = optax.adamw(1e-4)

    def loss(chosen, frozen):
        both = [f if c is None else c for c, f in zip(chosen, frozen, strict=True)]
        params = jax.tree_util.tree_unflatten(structure, both)
        return token_loss(model.apply({"params": params}, ids), ids)

    @jax.jit
    def step(chosen, state, frozen):
        value, gradients = jax.value_and_grad(loss)(chosen, frozen)
        updates, state = tx.update(gradients, state, chosen)
        return optax.apply_updates(chosen, updates), state, value

    state = tx.init(chosen)
    return lambda: step(chosen, state, frozen)


def cases() -> dict[str, Step]:
    module = CausalLM(CONFIG)
    ids = jax.random.randint(jax.random.key(0), (BATCH, SEQ), 0, CONFIG.vocab_size)
    params = jax.jit(module.init)(jax.random.key(1), ids)["params"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapter = init_adapter(jax.random.key(2), params, config, layouts=LAYOUTS)
    steps = {
        "frozen base, forward and backward to inputs": base_step(module, params, ids),
        "LoRA": lora_step(module, params, ids, adapter),
        "full fine-tuning": full_step(module, params, ids),
    }
    for step in steps.values():
        jax.block_until_ready(step())
    ours, linear._delta = linear._delta, plain_delta
    steps["LoRA, plain autodiff"] = lora_step(module, params, ids, adapter)
    jax.block_until_ready(steps["LoRA, plain autodiff"]())
    linear._delta = ours
    try:
        steps["LoRA, qwix"] = qwix_step(module, params, ids)
        jax.block_until_ready(steps["LoRA, qwix"]())
    except Exception as error:  # another's library, optional here
        steps.pop("LoRA, qwix", None)
        print(f"qwix left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    return steps


def measure(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, list[Times]]:
    """Wall and processor seconds of each case, one of each per round."""
    names, end = list(steps), time.perf_counter() + seconds
    times: dict[str, list[Times]] = {name: [] for name in names}
    for r in range(rounds):
        if time.perf_counter() > end:
            break
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(steps[name]())
            stop = time.perf_counter(), time.process_time()
            times[name].append((stop[0] - start[0], stop[1] - start[1]))
    return times


def report(times: dict[str, list[Times]]) -> None:
    base = next(iter(times.values()))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(base)} rounds")
    print("| case | wall s: median (min) | CPU s | wall ratio: median (quartiles) | CPU ratio |")
    print("|---|---|---|---|---|")
    for name, own in times.items():
        wall, cpu = zip(*own, strict=True)
        ratios = [[t[i] / b[i] for t, b in zip(own, base, strict=True)] for i in (0, 1)]
        low, middle, high = statistics.quantiles(ratios[0], n=4)
        low_cpu, middle_cpu, high_cpu = statistics.quantiles(ratios[1], n=4)
        print(
            f"| {name} | {statistics.median(wall):.3f} ({min(wall):.3f}) |"
            f" {statistics.median(cpu):.3f} | {middle:.3f} ({low:.3f} .. {high:.3f}) |"
            f" {middle_cpu:.3f} ({low_cpu:.3f} .. {high_cpu:.3f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a LoRA step over a frozen base.")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long")
    arguments = parser.parse_args()
    report(measure(cases(), arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
