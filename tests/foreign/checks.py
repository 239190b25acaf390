"""What holds of any model with an adapter, whoever wrote it: checks on functions of its params."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import LoraConfig, init_adapter, merge_adapter, quantize
from lora_jax._tree import leaves_with_path, map_with_path
from lora_jax.lora import TRAINED, target_name


@dataclasses.dataclass(frozen=True)
class Model:
    """Somebody's model, alone and with an adapter, and what is known of its parameters.

    `of_merged` computes with merged parameters, where that is not what `plain` does.
    """

    params: Any
    layouts: Any
    plain: Callable[[Any], jax.Array]
    adapted: Callable[[Any, Any], jax.Array]
    of_merged: Callable[[Any], jax.Array] | None = None
    options: Any = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def used(self) -> list[str]:
        """All parameters that are multiplied or looked up."""
        return [path for path, layout in self.layouts.items() if layout.contracting]

    @functools.cached_property
    def adapter(self) -> Any:
        """A random one of all that can have one."""
        names = sorted({target_name(path).rpartition("/")[2] for path in self.used})
        config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, **self.options)
        made = init_adapter(jax.random.key(1), self.params, config, layouts=self.layouts)
        factors = [path for path, _ in leaves_with_path(made) if path.endswith("lora_A")]
        assert len(factors) == len(self.used)
        return made

    def _by_merge(self, params: Any, adapter: Any) -> jax.Array:
        merged = merge_adapter(params, adapter, layouts=self.layouts)
        return (self.of_merged or self.plain)(merged)

    @functools.cached_property
    def run(self) -> Any:
        """Output and gradients of (adapter, params), as one program."""
        return _with_gradients(self.adapted)

    @functools.cached_property
    def run_merged(self) -> Any:
        """The same by dense merged weights."""
        return _with_gradients(self._by_merge)

    def four_bits(self) -> Any:
        """The parameters, with all that are used in four bits."""

        def leaf(path: str, x: Any) -> Any:
            if path not in self.used:
                return x
            layout = self.layouts[path]
            return quantize(x, stacked=layout.leading_axes, contracting=layout.contracting)

        return map_with_path(leaf, self.params)


def _with_gradients(forward: Callable[[Any, Any], jax.Array]) -> Any:
    def compute(adapter: Any, params: Any) -> Any:
        out, pull = jax.vjp(lambda adapter: forward(params, adapter), adapter)
        (grads,) = pull(jax.grad(loss)(out))
        return out, grads

    return jax.jit(compute)


def check(model: Model) -> None:
    """An adapter is its merge and has its gradients, on dense weights and on four bits."""
    plain = jax.jit(model.plain)(model.params)
    for params in (model.params, model.four_bits()):
        own, grads = model.run(model.adapter, params)
        out, expected = model.run_merged(model.adapter, params)
        close(own, out)
        assert np.max(np.abs(out - plain)) > 0.01 * np.max(np.abs(plain))
        check_gradients(dict(leaves_with_path(grads)), dict(leaves_with_path(expected)))


def check_gradients(own: dict[str, Any], expected: dict[str, Any]) -> None:
    trained = {path for path in expected if path.endswith(TRAINED)}
    assert trained <= own.keys()
    for path in trained:
        assert np.any(expected[path]), path
        close(own[path], expected[path], 5e-5, path)


def check_training(model: Model) -> None:
    """A few steps of an optimizer lower the loss, and leave the base as it was."""
    before = jax.tree.map(np.array, model.params)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def update(adapter: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapter, updates), state

    adapter, losses = model.adapter, []
    state = optimizer.init(adapter)
    for _ in range(6):
        out, grads = model.run(adapter, model.params)
        losses.append(float(loss(out)))
        adapter, state = update(adapter, state, grads)
    assert losses[-1] < 0.9 * losses[0], losses
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    close(model.run(adapter, model.params)[0], model.run_merged(adapter, model.params)[0])


def loss(out: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(out - 1))


def close(own: Any, expected: Any, rtol: float = 1e-5, what: str = "") -> None:
    """Equal up to a part of the largest."""
    largest = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(own, expected, rtol=0, atol=rtol * largest, err_msg=what)
