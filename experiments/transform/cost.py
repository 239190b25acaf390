"""What wrapping a module costs: products in the program, time to trace, time of the fallback.

    python experiments/transform/cost.py [--rounds 15]

1. Dots of the compiled forward pass of a model, alone and with an adapter on every linear layer.
2. Seconds to trace the forward pass, and the step of an optimizer, of 12 layers written out: the
   module alone; wrapped and without an adapter; wrapped with one.  The three take turns.
3. A layer of 1024 x 1024 that the transform knows (factored) and one that reads its parameter
   itself (the fallback, W0 + scaling·A·B), beside the frozen layer alone: seconds of forward and
   backward pass by number of tokens.

Writes `cost.json`.
"""

import argparse
import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from lora_jax import (  # noqa: E402
    LoraConfig,
    combine,
    init_adapter,
    lora_linen,
    lora_nnx,
    nnx_layouts,
    nnx_params,
)

HERE = Path(__file__).resolve().parent
LAYERS, WIDTH = 12, 64
CONFIG = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(y)
        y = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(y)


class Model(nn.Module):
    """Layers written out, so that tracing has something to do."""

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = Block(name=f"layer_{i}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.first(x))
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Known(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], use_bias=False, name="layer")(x)


class Unknown(nn.Module):
    """The same layer by a module of somebody's own."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], x.shape[-1])
        return jnp.tanh(x @ self.param("layer", nn.initializers.lecun_normal(), shape))


def main() -> None:
    parser = argparse.ArgumentParser(description="What wrapping a module costs.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "dots": {},
        "trace": {},
    }
    x = jax.ShapeDtypeStruct((2, 32, WIDTH), jnp.float32)
    for name, make in (("linen", linen), ("nnx", from_nnx)):
        plain, wrapped, adapted, trees, layers = make(x)
        functions = {"alone": (plain, trees[0]), "wrapped": (wrapped, trees[0])}
        functions["adapted"] = (adapted, trees[1])
        counts = {key: dots(f, tree, x) for key, (f, tree) in functions.items()}
        found["dots"][name] = counts | {"adapted_layers": layers}
        found["trace"][name] = {
            "forward": traced(functions, x, rounds),
            "gradient": traced(functions, x, rounds, backward=True),
        }
        print(json.dumps({k: found[k][name] for k in ("dots", "trace")}), flush=True)
    found["fallback"] = [fallback(tokens, rounds) for tokens in (16, 128, 1024)]
    found["load_after"] = os.getloadavg()[0]
    text = json.dumps(found, indent=1) + "\n"
    (HERE / "cost.json").write_text(text, encoding="utf-8")
    print(text)


def linen(x: Any) -> tuple[Any, ...]:
    """The model alone, wrapped and adapted, as functions of (params, x)."""
    model = Model()
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros(x.shape))["params"]
    lora = lora_linen(model)
    adapter = init_adapter(jax.random.key(1), base, CONFIG, layouts=lora.layouts(base, x))

    def own(params: Any, x: Any) -> Any:
        return model.apply({"params": params}, x)

    def ours(params: Any, x: Any) -> Any:
        return lora.apply({"params": params}, x)

    return own, ours, ours, (base, combine(base, adapter)), 6 * LAYERS


def from_nnx(x: Any) -> tuple[Any, ...]:
    """The same in NNX, as functions of (state, x)."""
    model = NnxModel(nnx.Rngs(0))
    layouts = nnx_layouts(model, x)
    adapter = init_adapter(jax.random.key(1), nnx_params(model), CONFIG, layouts=layouts)
    modules = model, lora_nnx(model), lora_nnx(model, adapter)
    functions, states = [], []
    for module in modules:
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        functions.append(
            lambda params, x, graphdef=graphdef, rest=rest: nnx.merge(graphdef, params, rest)(x)
        )
        states.append(params)
    return *functions, (states[0], states[2]), 6 * LAYERS


def dots(function: Callable[..., Any], tree: Any, x: Any) -> int:
    """Products of matrices in the compiled program."""
    text = jax.jit(function).lower(tree, x).compile().as_text()
    return len(re.findall(r"= \S+ dot\(", text))


def traced(
    functions: dict[str, tuple[Any, Any]], x: Any, rounds: int, *, backward: bool = False
) -> dict[str, Any]:
    """Seconds to trace each, and the ratios to the first within a round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        order = list(functions) if turn % 2 else list(functions)[::-1]
        for name in order:
            function, tree = functions[name]

            # A function of its own each time: JAX remembers what it has traced.
            def fresh(tree: Any, x: Any, function: Any = function) -> Any:
                return jnp.sum(function(tree, x))

            program = jax.jit(jax.grad(fresh) if backward else fresh)
            gc.collect()
            gc.disable()  # a collection takes as long as many layers, in whichever turn it falls
            begin = time.process_time()  # the work of one thread, whatever else is running
            program.trace(tree, x)
            times[name].append(time.process_time() - begin)
            gc.enable()
    times = {name: seconds[1:] for name, seconds in times.items()}
    first = times["alone"]
    return {
        name: {
            "seconds": round(statistics.median(seconds), 4),
            "over_alone": spread([a / b for a, b in zip(seconds, first, strict=True)]),
        }
        for name, seconds in times.items()
    }


def fallback(tokens: int, rounds: int, width: int = 1024) -> dict[str, Any]:
    """Seconds of a layer's gradient, frozen, factored and opened to its dense weight."""
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    steps: dict[str, Callable[[], Any]] = {}
    for name, module in (("factored", Known()), ("fallback", Unknown())):
        base = jax.jit(module.init)(jax.random.key(1), x)["params"]
        config = LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False)
        adapter = init_adapter(jax.random.key(2), base, config)
        lora = lora_linen(module)

        def loss(adapter: Any, x: Any, base: Any = base, lora: Any = lora) -> Any:
            return jnp.sum(lora.apply({"params": combine(base, adapter)}, x) ** 2)

        own = jax.jit(jax.grad(loss, (0, 1)))
        steps[name] = lambda own=own, adapter=adapter: own(adapter, x)
        alone = jax.jit(jax.grad(lambda x, base=base, lora=lora: loss({}, x, base, lora)))
        steps[f"frozen_{name}"] = lambda alone=alone: alone(x)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            begin = time.perf_counter()
            jax.block_until_ready(steps[name]())
            times[name].append(time.perf_counter() - begin)
    times = {name: seconds[2:] for name, seconds in times.items()}
    row: dict[str, Any] = {"tokens": tokens}
    for name in ("factored", "fallback"):
        pairs = zip(times[name], times[f"frozen_{name}"], strict=True)
        row[name] = {
            "milliseconds": round(1e3 * statistics.median(times[name]), 3),
            "over_frozen": spread([a / b for a, b in pairs]),
        }
    return row


def spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 3), "q1": round(q1, 3), "q3": round(q3, 3)}


if __name__ == "__main__":
    main()
