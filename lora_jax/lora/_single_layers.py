"""An adapter as single layers, each trimmed to its own rank, and back to its tree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from .._config import LoraConfig
from .._errors import InputError
from .._tree import leaves_with_path, tree_from_paths
from .._typing import Array, Params
from ._layout import Layouts, paths_of_layers, rule_for
from ._target import pattern_name, target_name
from ._targets import adapter_names, bias_name, is_target
from ._tied import tied_config


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """The factors of one layer or expert; of rank 0 where a layer of a stack has no adapter."""

    name: str
    """Path of its module, `model/layers/0/self_attn/q_proj`; of an expert with its number."""
    lora_A: Float[Array, "d_in rank"]
    lora_B: Float[Array, "rank d_out"]
    scaling: Float[Array, ""]
    is_expert: bool = False
    lora_B_bias: Float[Array, " d_out"] | None = None

    @property
    def layer(self) -> str:
        """The name without an expert's number."""
        return self.name.rpartition("/")[0] if self.is_expert else self.name

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-1]


def single_layers(
    adapter: Params, config: LoraConfig, layouts: Layouts | None = None
) -> dict[str, tuple[AdaptedLayer, ...]]:
    """From the path of each adapted parameter to its layers, one where it is not stacked.

    Of a stack of experts each is a layer, after those of the layer before.

    Which layers there are, and of what rank, is read from the config: it holds under `jit` too.

    Args:
        adapter: As from `init_adapter`; modules it holds in full are left out.
        config: The config it was made with.
        layouts: The layouts it was made with.

    Raises:
        InputError: if the adapter is not the config's, a stack is not in the layouts, the adapter
            has magnitudes (DoRA), or it belongs to a base that its start has moved.

    Example:
        >>> adapter = {"q": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 6)),
        ...                  "lora_scaling": jnp.float32(1)}}
        >>> config = LoraConfig(r=2, target_modules=["q"])
        >>> [(path, layer.rank) for path, (layer,) in single_layers(adapter, config).items()]
        [('q/kernel', 2)]
    """
    leaves = dict(leaves_with_path(adapter))
    config = tied_config(adapter, config)
    check_unmoved("single_layers", config)
    if lengths := [path for path in leaves if path.endswith("lora_magnitude")]:
        raise InputError(
            f"{lengths[0]}: deltas under DoRA do not add up, since each has its own norms; merge"
            " adapters one by one"
        )
    params = [adapted_param(path) for path in leaves if path.endswith("lora_A")]
    return {param: tuple(_layers_of(param, leaves, config, layouts)) for param in params}


def check_unmoved(what: str, config: LoraConfig) -> None:
    """Refuse an adapter whose delta is only one over a base that its start has moved."""
    if config.moves_base:
        raise InputError(
            f"{what}: an adapter that started with init_lora_weights={config.init_lora_weights!r}"
            " belongs to the base which that moved; make it plain by without_start first"
        )


def adapter_from_layers(
    layers: Mapping[str, Sequence[AdaptedLayer]], rank: int, layouts: Layouts | None, dtype: Any
) -> dict[str, Any]:
    """The adapter with these layers, all padded to one rank; the inverse of `single_layers`.

    Example:
        >>> layer = AdaptedLayer("q", jnp.ones((4, 2)), jnp.ones((2, 6)), jnp.float32(1))
        >>> adapter = adapter_from_layers({"q/kernel": [layer]}, 3, None, "bfloat16")
        >>> adapter["q"]["lora_A"].shape, adapter["q"]["lora_B"].shape
        ((4, 3), (3, 6))
    """
    leaves: dict[str, Any] = {}
    for param, own in layers.items():
        pads = [(0, rank - layer.rank) for layer in own]
        a = jnp.stack([jnp.pad(x.lora_A, ((0, 0), pad)) for x, pad in zip(own, pads, strict=True)])
        b = jnp.stack([jnp.pad(x.lora_B, (pad, (0, 0))) for x, pad in zip(own, pads, strict=True)])
        scaling = jnp.stack([jnp.asarray(layer.scaling, jnp.float32) for layer in own])
        layout = rule_for(layouts, param)
        lead = (-1,) if layout.leading_axes == 1 else ()
        if layout.leading_axes == 2:
            lead = (len({x.layer for x in own}), -1)
        values = (a.astype(dtype), b.astype(dtype), scaling)
        for path, value in zip(adapter_names(param), values, strict=True):
            leaves[path] = value.reshape((*lead, *value.shape[1:]))
        if any(layer.lora_B_bias is not None for layer in own):
            none = jnp.zeros(b.shape[-1])
            biases = [none if x.lora_B_bias is None else x.lora_B_bias for x in own]
            bias = jnp.stack(biases).astype(dtype)
            leaves[bias_name(param)] = bias.reshape((*lead, *bias.shape[1:]))
    return tree_from_paths(leaves)


def whole_parameters(adapter: Params) -> list[str]:
    """Paths of what an adapter holds in full: modules to save, and rows of tables.

    Example:
        >>> whole_parameters({"lm_head": {"kernel": 1}, "q": {"lora_A": 2}})
        ['lm_head/kernel']
    """
    paths = [path for path, _ in leaves_with_path(adapter)]
    return [p for p in paths if p.endswith("lora_tokens") or "lora_" not in p.rpartition("/")[2]]


def adapted_param(path_a: str) -> str:
    """The parameter beside which a `lora_A` lies: what `adapter_names` was given."""
    prefix = path_a.removesuffix("lora_A")
    of_module = not prefix or prefix.endswith("/")
    return f"{prefix}kernel" if of_module else prefix.removesuffix("_")


def _layers_of(
    param: str, leaves: Mapping[str, Any], config: LoraConfig, layouts: Layouts | None
) -> list[AdaptedLayer]:
    paths = adapter_names(param)
    if missing := [path for path in paths if path not in leaves]:
        raise InputError(f"{param}: the adapter lacks {', '.join(missing)}")
    a, b, scaling = (jnp.asarray(leaves[path]) for path in paths)
    layout = rule_for(layouts, param)
    if a.ndim != 2 + layout.leading_axes:
        raise InputError(
            f"{paths[0]} has shape {a.shape}: pass the layouts the adapter was made with"
        )
    names = paths_of_layers(target_name(param), layout, a.shape)
    ranks = [
        config.rank(pattern_name(name, param, config)) if is_target(name, param, config) else 0
        for name in names
    ]
    if max(ranks) != a.shape[-1]:
        raise InputError(
            f"{paths[0]} has rank {a.shape[-1]}, but the config gives {max(ranks)}; pass the config"
            " the adapter was made with"
        )
    if layout.experts:
        count = a.shape[layout.leading_axes - 1]
        names = [f"{name}/{i}" for name in names for i in range(count)]
        ranks = [rank for rank in ranks for _ in range(count)]
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    bias = leaves.get(bias_name(param))
    biases = [None] * len(a) if bias is None else jnp.asarray(bias).reshape(len(a), -1)
    parts = zip(names, ranks, a, b, scaling.reshape(-1), biases, strict=True)
    return [
        AdaptedLayer(name, a[:, :rank], b[:rank], s, layout.experts, bias)
        for name, rank, a, b, s, bias in parts
    ]
