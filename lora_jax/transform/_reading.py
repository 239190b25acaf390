"""What the axes of every parameter mean, read off the program that uses them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from .._tree import map_with_path
from .._typing import Params
from ..lora import KernelLayout, leaf_shape

_SAME_AXES = (
    "convert_element_type", "copy", "reduce_precision", "optimization_barrier", "mul",
    "div", "add", "add_any", "sub", "neg", "select_n", "clamp", "round", "sign", "slice", "split",
    "dynamic_slice", "sharding_constraint", "pvary", "integer_pow", "square", "tanh", "exp",
    "stop_gradient", "name", "pad", "rev", "device_put", "max", "min",
)  # fmt: skip
"""Primitives whose outputs have the axes of their inputs, if as many."""


@dataclasses.dataclass(frozen=True)
class _View:
    """A parameter, or a part of it, as an array that a program computes with.

    `axes`: for each axis of the array the parameter's axes that it runs through, none for a new
    one.  `sizes`: of the parameter's axes.
    """

    path: str
    axes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]


class _Input:
    """Whatever depends on the program's inputs."""


_INPUT = _Input()
_Known = _View | _Input | None
"""What is known of an array; None of one that comes from parameters and constants otherwise."""


@dataclasses.dataclass
class Reading:
    """What a program does with its parameters: the first product of each, and who is stacked.

    `uses` has no contracted axes where a parameter meets inputs otherwise than in a product.
    `scans`: for each scan the parameters of which every step takes one slice.
    """

    uses: dict[str, KernelLayout] = dataclasses.field(default_factory=dict)
    scans: list[list[str]] = dataclasses.field(default_factory=list)

    @property
    def stacked(self) -> set[str]:
        """Every parameter that a scan takes slices of."""
        return {path for paths in self.scans for path in paths}


def read_program(
    function: Callable[..., Any], params: Params, *args: Any, **kwargs: Any
) -> Reading:
    """Trace a function of parameters, and follow each of them to what it is multiplied with.

    Args:
        function: Any function of a nested dict of parameters.
        params: Arrays, quantized tensors (taken for the dense ones) or shapes.
        *args, **kwargs: Inputs: arrays and shapes are traced; flags, strings and functions stay as
            they are.

    Returns:
        For every parameter that meets another array: the contracted axes of a product, those of a
        window and of the input features of a convolution, the words of a table that is looked up;
        whether an axis in front numbers experts.  All of the parameter's own axes count.

    Example:
        >>> import jax.numpy as jnp
        >>> def model(params, x):
        ...     return jnp.einsum("bthd,hdm->btm", x, params["out"])
        >>> reading = read_program(model, {"out": jnp.ones((2, 4, 8))}, jnp.ones((1, 3, 2, 4)))
        >>> reading.uses["out"].contracting
        (0, 1)
    """
    dense = map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(*leaf_shape(leaf)), params)
    inputs, structure = jax.tree.flatten((args, kwargs))
    traced = {i: leaf for i, leaf in enumerate(inputs) if hasattr(leaf, "shape")}

    def program(params: Params, traced: dict[int, Any]) -> Any:
        given = [traced.get(i, leaf) for i, leaf in enumerate(inputs)]
        args, kwargs = jax.tree.unflatten(structure, given)
        return function(params, *args, **kwargs)

    closed = jax.make_jaxpr(program)(dense, traced)
    # In the order in which JAX takes them.
    paths = jax.tree.leaves(map_with_path(lambda path, _: path, dense))
    views = [
        _View(path, tuple((axis,) for axis in range(leaf.ndim)), leaf.shape)
        for path, leaf in zip(paths, jax.tree.leaves(dense), strict=True)
    ]
    reading = Reading()
    rest = [_INPUT] * (len(closed.jaxpr.invars) - len(views))
    _walk(closed.jaxpr, [*views, *rest], reading)
    return reading


def _walk(jaxpr: Any, known: Sequence[_Known], reading: Reading) -> list[_Known]:
    """Follow parameters and inputs through a program; what is known of its outputs."""
    seen: dict[Any, _Known] = dict(zip(jaxpr.invars, known, strict=True))

    def about(var: Any) -> _Known:
        return None if isinstance(var, core.Literal) else seen.get(var)

    for eqn in jaxpr.eqns:
        given = [about(var) for var in eqn.invars]
        if any(given):
            seen |= zip(eqn.outvars, _step(eqn, given, reading), strict=True)
    return [about(var) for var in jaxpr.outvars]


def _step(eqn: Any, given: list[_Known], reading: Reading) -> Sequence[_Known]:
    """What one equation does with parameters, and what is known of its results."""
    name, params = eqn.primitive.name, eqn.params
    mixed: list[_Known] = [_INPUT if _INPUT in given else None] * len(eqn.outvars)
    if name in _USES:
        if _INPUT in given:
            for own, use in zip(given, _USES[name](eqn), strict=False):
                if isinstance(own, _View) and use:
                    _note(own, use, reading)
        return mixed
    if name in _MOVES and isinstance(given[0], _View):
        return [_MOVES[name](given[0], eqn)]
    if name in _SAME_AXES and _INPUT not in given:
        return [_same_axes(given, out) for out in eqn.outvars]
    if name == "scan":
        return _scan(params, given, reading)
    if name == "while":
        consts, inner = params["cond_nconsts"], params["body_nconsts"]
        return _loop(params["body_jaxpr"].jaxpr, given[consts:], inner, reading)
    if name == "cond":
        ways = [_walk(branch.jaxpr, given[1:], reading) for branch in params["branches"]]
        return [_either(found) for found in zip(*ways, strict=True)]
    for inner in _programs(params):
        if len(inner.invars) == len(given):
            return _walk(inner, given, reading)
    for own in given:
        if isinstance(own, _View) and _INPUT in given:
            reading.uses.setdefault(own.path, _OTHERWISE)
    return mixed


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls: of `jit`, `checkpoint`, a function with its own rule."""
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _scan(params: Mapping[str, Any], given: list[_Known], reading: Reading) -> list[_Known]:
    consts, carry = _sizes_of_scan(params)
    begin = consts + carry
    slices = [_without_first(x) if isinstance(x, _View) else x for x in given[begin:]]
    reading.scans.append([x.path for x in slices if isinstance(x, _View)])
    made = _loop(params["jaxpr"].jaxpr, [*given[:begin], *slices], consts, reading, len(slices))
    return [x if i < carry or x is _INPUT else None for i, x in enumerate(made)]


def _sizes_of_scan(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried arrays a scan has."""
    if "num_consts" in params:  # up to JAX 0.11
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _loop(
    body: Any, given: list[_Known], consts: int, reading: Reading, slices: int = 0
) -> list[_Known]:
    """A body whose carry, behind the constants, is what a first round makes of it."""
    end = len(given) - slices
    first = _walk(body, given, Reading())[: end - consts]
    carry = [_either(both) for both in zip(given[consts:end], first, strict=True)]
    return _walk(body, [*given[:consts], *carry, *given[end:]], reading)


def _either(found: Sequence[_Known]) -> _Known:
    """What is known of an array that comes from one of several places."""
    return _INPUT if _INPUT in found else found[0] if len(set(found)) == 1 else None


def _without_first(view: _View) -> _View | None:
    """One slice of a stack along the parameter's first axis; None of another."""
    return dataclasses.replace(view, axes=view.axes[1:]) if view.axes[0] == (0,) else None


def _note(view: _View, use: KernelLayout, reading: Reading) -> None:
    """Note a use by the parameter's own axes; a table that is looked up is one first of all."""
    axes = tuple(own for axis in use.contracting or () for own in view.axes[axis])
    first = int(view.path in reading.stacked)  # behind the axis that a scan takes away
    # Where one of several was picked by its number, each is a matrix of its own.
    picked = all(first not in own for own in view.axes) and view.sizes[first : first + 1] > (1,)
    known = axes and min(axes) >= first and not (use.experts and view.axes[0] != (first,))
    axes = axes if use.window else tuple(sorted(axes))
    if use is _LOOK_UP or reading.uses.get(view.path, _OTHERWISE) == _OTHERWISE:
        found = dataclasses.replace(use, contracting=axes, experts=use.experts or picked)
        reading.uses[view.path] = found if known and not (picked and use.window) else _OTHERWISE


def _products(eqn: Any) -> Iterator[KernelLayout | None]:
    """What a product does with each of its operands."""
    contracted, batch = eqn.params["dimension_numbers"]
    for axes, shared in zip(contracted, batch, strict=True):
        # A batch axis of both operands numbers experts if it is the parameter's first.
        known = shared in ((), (0,))
        yield KernelLayout(tuple(axes), experts=bool(shared)) if known else _OTHERWISE


def _convolution(eqn: Any) -> Iterator[KernelLayout | None]:
    """What a convolution does with its input, which is no kernel, and with its kernel."""
    _, features, *spatial = eqn.params["dimension_numbers"].rhs_spec
    yield None
    window = tuple(eqn.invars[1].aval.shape[axis] for axis in spatial)
    found = KernelLayout((*spatial, features), window=window)
    plain = eqn.params["batch_group_count"] == 1
    groups = eqn.params["feature_group_count"]
    yield dataclasses.replace(found, groups=groups) if plain else _OTHERWISE


_LOOK_UP = KernelLayout((0,))
_OTHERWISE = KernelLayout(())


def _look_up(eqn: Any) -> Iterator[KernelLayout | None]:
    """Whether a gather takes whole rows of its operand."""
    rows = eqn.params["dimension_numbers"].start_index_map == (0,)
    whole = eqn.params["slice_sizes"][1:] == eqn.invars[0].aval.shape[1:]
    yield _LOOK_UP if rows and whole else _OTHERWISE


def _transposed(view: _View, eqn: Any) -> _View:
    axes = tuple(view.axes[axis] for axis in eqn.params["permutation"])
    return dataclasses.replace(view, axes=axes)


def _squeezed(view: _View, eqn: Any) -> _View:
    gone = eqn.params["dimensions"]
    axes = tuple(axes for axis, axes in enumerate(view.axes) if axis not in gone)
    return dataclasses.replace(view, axes=axes)


def _broadcast(view: _View, eqn: Any) -> _View:
    axes: list[tuple[int, ...]] = [()] * len(eqn.params["shape"])
    for own, axis in zip(view.axes, eqn.params["broadcast_dimensions"], strict=True):
        axes[axis] = own
    return dataclasses.replace(view, axes=tuple(axes))


def _reshaped(view: _View, eqn: Any) -> _View | None:
    """Axes joined, and joined ones cut where they were; None if an axis is cut within."""
    queue = [(axis, view.sizes[axis]) for axes in view.axes for axis in axes]
    if math.prod(size for _, size in queue) != math.prod(eqn.params["new_sizes"]):
        return None
    made = []
    for size in eqn.params["new_sizes"]:
        own: list[int] = []
        while queue and math.prod(view.sizes[axis] for axis in own) < size:
            own.append(queue.pop(0)[0])
        if math.prod(view.sizes[axis] for axis in own) != size:
            return None
        made.append(tuple(own))
    return dataclasses.replace(view, axes=tuple(made))


def _same_axes(given: list[_Known], out: Any) -> _View | None:
    """The first parameter's axes, if the result has as many."""
    views = (x for x in given if isinstance(x, _View))
    return next((view for view in views if len(view.axes) == len(out.aval.shape)), None)


_USES = {"dot_general": _products, "conv_general_dilated": _convolution, "gather": _look_up}
_MOVES = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
}
