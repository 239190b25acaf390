"""Any NNX module with its adapter, as a module again; the one that is given stays as it is."""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax  # noqa: F401 (the examples use it)
import jax.numpy as jnp
from flax import nnx

from .._errors import InputError
from .._tree import is_below, leaves_with_path, tree_from_paths
from .._typing import Array, Params
from ..lora import TRAINED, KernelLayout, Layouts, adapted_param, box_adapters, rule_for
from ..quant import QuantizedTensor
from ._contraction import contraction_of
from ._convolution import convolution_of, convolved, is_linear_in_kernel
from ._product import ADAPTED, KNOWN, attended, looked_up, product
from ._reading import Reading, read_program

_PLACE = "lora_place"
"""The attribute of a module with an adapter that holds its path, and what is known of its axes."""


class LoraVariable(nnx.LoRAParam):
    """What is trained of an adapter; filters know it as `nnx.LoRAParam`."""


class LoraConstant(nnx.Param):
    """What belongs to an adapter and is not trained: `lora_scaling`, keys of dropout, chosen rows.

    A `Param`, so that filters by which a user's own `nnx.scan` or `nnx.vmap` cuts the layers'
    parameters cut it as well.
    """


def lora_nnx(module: Any, adapter: Params | None = None, *, layouts: Layouts | None = None) -> Any:
    """A module that computes with an adapter, and with quantized weights.

    It is of the same structure, and its class is derived from the given module's.  Its variables
    are new, on the same arrays: `nnx.Param` is the base, `nnx.LoRAParam` what is trained,
    `LoraConstant` the rest of the adapter.  `Linear`, `LinearGeneral`, `Einsum`, `Conv`,
    `ConvTranspose` and `Embed` use the factored form; any other module that reads an adapted
    parameter gets W0 + scaling·A·B.

    Args:
        module: Any NNX module; it is not changed.  It may hold quantized weights.
        adapter: As from `init_adapter(key, nnx_params(module), config)`.
        layouts: Only for adapted parameters that unknown modules use, where they are not
            (d_in, d_out); see `nnx_layouts`.

    Raises:
        InputError: if the adapter is for another structure, or `module` is no NNX module.

    Example:
        >>> from lora_jax import LoraConfig, init_adapter
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up = nnx.Linear(4, 8, rngs=rngs)
        ...     def __call__(self, x):
        ...         return nnx.relu(self.up(x))
        >>> model = Model(nnx.Rngs(0))
        >>> config = LoraConfig(r=2, target_modules=["up"])
        >>> adapter = init_adapter(jax.random.key(1), nnx_params(model), config)
        >>> adapted = lora_nnx(model, adapter)
        >>> grads = nnx.grad(
        ...     lambda model, x: model(x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam)
        ... )(adapted, jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(grads))
        {'up': {'lora_A': (4, 2), 'lora_B': (2, 8)}}
    """
    _check_module(module)
    adapted = nnx.clone(module)
    leaves = dict(leaves_with_path(adapter or {}))
    nodes = dict(_nodes(adapted, nnx.Module))
    for path, value in leaves.items():
        owner, _, name = path.rpartition("/")
        if owner not in nodes or not ("lora_" in name or name in vars(nodes[owner])):
            raise InputError(
                f"{path}: there is no module {owner} with a {name}; this adapter"
                " was made for another structure. There is:"
                f" {', '.join(path for path, _ in leaves_with_path(nnx_params(module)))}"
            )
        trained = "lora_" not in name or name.endswith(TRAINED)
        setattr(nodes[owner], name, (LoraVariable if trained else LoraConstant)(value))
    box_adapters(_collect(adapted, lambda _: True), layouts)  # refuses what does not fit
    for path, node in nodes.items():
        _adapt(node, path, layouts or {})
    return adapted


def nnx_params(module: Any) -> dict[str, Any]:
    """The parameters of a module as a nested dict, without any adapter.

    Args:
        module: Any NNX module, also one with an adapter.

    Returns:
        The values of all `nnx.Param`, by the names of attributes and the numbers of lists: what
        `init_adapter` and `merge_adapter` take for `base_params`.

    Example:
        >>> jax.tree.map(jnp.shape, nnx_params(nnx.Linear(4, 8, rngs=nnx.Rngs(0))))
        {'bias': (8,), 'kernel': (4, 8)}
    """
    _check_module(module)
    return _collect(module, lambda variable: type(variable) not in _ADAPTER)


def nnx_adapter(module: Any) -> dict[str, Any]:
    """The adapter of a module, as `lora_nnx` was given it or as training has made it.

    Example:
        >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> nnx_adapter(lora_nnx(model, {"bias": jnp.ones(8)}))["bias"].shape
        (8,)
    """
    _check_module(module)
    return _collect(module, lambda variable: type(variable) in _ADAPTER)


def with_nnx_params(module: Any, params: Params) -> Any:
    """The same module with other parameters: merged ones, or quantized ones.

    Args:
        module: Any NNX module; it is not changed.
        params: As from `nnx_params`, or a part of it.

    Raises:
        InputError: for a parameter that the module has not, or of another shape.

    Example:
        >>> from lora_jax import quantize
        >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((1, 64))
        >>> small = with_nnx_params(model, {"kernel": quantize(nnx_params(model)["kernel"])})
        >>> type(nnx_params(small)["kernel"]).__name__, small(x).shape
        ('QuantizedTensor', (1, 8))
    """
    _check_module(module)
    changed = nnx.clone(module)
    variables = {path: x for path, x in _nodes(changed, nnx.Param) if type(x) not in _ADAPTER}
    for path, value in leaves_with_path(params):
        own = variables[path].get_value().shape if path in variables else "not there"
        if own != value.shape:
            raise InputError(
                f"{path}: in the module it is {own}, got {value.shape}; give parameters of this"
                " module's structure, as from nnx_params"
            )
        variables[path].set_value(value)
    for path, node in _nodes(changed, nnx.Module):
        _adapt(node, path, {})
    return changed


def nnx_layouts(module: Any, *args: Any, **kwargs: Any) -> dict[str, KernelLayout]:
    """The layouts of all parameters a module multiplies, found by tracing it without computing.

    Args:
        module: Any NNX module.
        *args, **kwargs: Inputs of its `__call__`, arrays or shapes.

    Returns:
        As `LoraLinen.layouts`.  What one `nnx.scan` cuts is a stack, whose path is the longest
        above all of it; what `nnx.vmap` made are experts.

    Example:
        >>> model = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=nnx.Rngs(0))
        >>> nnx_layouts(model, jnp.ones((1, 2, 3)))["kernel"].contracting
        (0, 1)
    """
    _check_module(module)

    def run(params: Params, *args: Any, **kwargs: Any) -> Any:
        return with_nnx_params(module, params)(*args, **kwargs)

    return _layouts(read_program(run, nnx_params(module), *args, **kwargs))


def _layouts(reading: Reading) -> dict[str, KernelLayout]:
    stacks = {_above(paths) for paths in reading.scans if paths}

    def layout(path: str, use: KernelLayout) -> KernelLayout:
        above = [s for s in stacks if path in reading.stacked and is_below(path, s)]
        stack = min(above, key=len, default=None)
        lead = (stack is not None) + use.experts
        axes = tuple(axis - lead for axis in use.contracting or ())
        return KernelLayout(axes, stack, use.experts, use.window, use.groups)

    return {s: KernelLayout(stack=s) for s in sorted(stacks)} | {
        path: layout(path, use) for path, use in reading.uses.items() if use.contracting
    }


def _above(paths: list[str]) -> str:
    """The longest path of a module that is above all of these parameters."""
    first, *others = (path.split("/")[:-1] for path in paths)
    length = 0
    while length < len(first) and all(x[length : length + 1] == [first[length]] for x in others):
        length += 1
    return "/".join(first[:length])


_ADAPTER = (LoraVariable, LoraConstant)


def _check_module(module: Any) -> None:
    if not isinstance(module, nnx.Module):
        raise InputError(
            f"lora_nnx: takes an nnx.Module, not {type(module).__name__}; for Linen there is"
            " lora_linen"
        )


def _nodes(module: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Every module or variable of a kind with its path; one that is shared once."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, kind):
            yield "/".join(map(str, path)), node


def _collect(module: Any, chosen: Callable[[nnx.Param], bool]) -> dict[str, Any]:
    """The values of the chosen parameters, by path."""
    nodes = sorted(_nodes(module, nnx.Param), key=lambda node: node[0])
    return tree_from_paths({path: x.get_value() for path, x in nodes if chosen(x)})


def _adapt(module: Any, path: str, layouts: Layouts) -> None:
    """Let a module compute with what it holds, if any of that is adapted or quantized."""
    own = {name: x for name, x in vars(module).items() if isinstance(x, nnx.Param)}
    adapted = {adapted_param(n) for n in own if n.endswith(("lora_A", "lora_tokens"))}
    quantized = {n for n, x in own.items() if isinstance(x.get_value(), QuantizedTensor)}
    names = tuple(sorted(adapted | quantized))
    if not names:
        return
    axes = {name: rule_for(layouts, f"{path}/{name}" if path else name) for name in names}
    setattr(module, _PLACE, (path, tuple(axes.items())))
    module.__class__ = _adapted_class(_plain_class(type(module)), names)


def _plain_class(kind: type) -> type:
    """The class behind an adapted one."""
    return kind.__mro__[1] if "_lora_names" in vars(kind) else kind


@functools.cache
def _adapted_class(kind: type, names: tuple[str, ...]) -> type:
    """A module's class whose parameters of these names open to the weight that counts."""
    known = {
        nnx.Linear: {"__call__": _called},
        nnx.LinearGeneral: {"__call__": _called},
        nnx.Einsum: {"__call__": _called},
        nnx.Conv: {"__call__": _convolved},
        nnx.ConvTranspose: {"__call__": _convolved},
        nnx.Embed: {"__call__": _looked_up, "attend": _attended},
    }
    opened = {
        name: property(functools.partial(_opened, name=name), _setter(name)) for name in names
    }
    body = {"_lora_names": names, "__doc__": kind.__doc__, "__module__": kind.__module__}
    members = body | opened | known.get(kind, {})
    # A subclass has to say again whether it is a pytree.
    own = {"pytree": kind._pytree__is_pytree}
    return types.new_class(kind.__name__, (kind,), own, lambda space: space.update(members))


def _setter(name: str) -> Any:
    return lambda module, value: vars(module).__setitem__(name, value)


def _boxed(module: Any, name: str) -> Any:
    """A module's own parameter with its adapter in one box, or as it is."""
    path, axes = getattr(module, _PLACE)
    prefix = f"{path}/" if path else ""
    params = {
        prefix + own: x.get_value() for own, x in vars(module).items() if isinstance(x, nnx.Param)
    }
    layouts = {prefix + own: layout for own, layout in axes}
    boxed = dict(leaves_with_path(box_adapters(tree_from_paths(params), layouts)))
    return boxed[prefix + name]


def _opened(module: Any, name: str) -> Any:
    """The variable as modules read it that know of no adapter."""
    value = _boxed(module, name)
    variable = vars(module)[name]
    return variable.replace(value.unbox() if isinstance(value, KNOWN) else value)


def _called(module: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's product in factored form, or its own with the dense weight."""
    inputs, param = jnp.asarray(inputs), _boxed(module, "kernel")
    contraction = contraction_of(module, inputs.ndim, args, kind=_plain_class(type(module)))
    if contraction is not None and isinstance(param, KNOWN) and not _sharded(kwargs):
        bias = None if module.bias is None else module.bias[...]
        out = product(param, inputs, contraction, bias, _promote(module), module.precision)
        if out is not None:
            return out
    return _plain_class(type(module)).__call__(module, inputs, *args, **kwargs)


def _convolved(module: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """The convolution in factored form, or the layer's own with the dense weight."""
    kind, inputs, param = _plain_class(type(module)), jnp.asarray(inputs), _boxed(module, "kernel")
    convolution = convolution_of(module, kind)
    if convolution is None or not isinstance(param, ADAPTED) or not is_linear_in_kernel(module):
        return kind.__call__(module, inputs, *args, **kwargs)

    def convolve(x: Array, kernel: Array) -> Array:
        layer = object.__new__(kind)
        vars(layer).update(vars(module), kernel=nnx.Param(kernel), bias=None, use_bias=False)
        return kind.__call__(layer, x, *args, **kwargs)

    bias = None if module.bias is None else module.bias[...]
    return convolved(param, inputs, convolution, bias, _promote(module), convolve)


def _sharded(kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller says how the output is to be cut, which is left to the layer itself."""
    return kwargs.get("out_sharding") is not None


def _looked_up(module: Any, inputs: Any, **kwargs: Any) -> Any:
    if _sharded(kwargs):
        return nnx.Embed.__call__(module, inputs, **kwargs)
    return looked_up(_boxed(module, "embedding"), inputs, _promote(module, inexact=False))


def _attended(module: Any, query: Array, **kwargs: Any) -> Array:
    if _sharded(kwargs):
        return nnx.Embed.attend(module, query, **kwargs)
    return attended(_boxed(module, "embedding"), query, _promote(module))


def _promote(module: Any, **how: Any) -> Any:
    return lambda *arrays: module.promote_dtype(arrays, dtype=module.dtype, **how)
