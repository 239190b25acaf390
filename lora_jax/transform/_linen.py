"""Any Linen module with its adapter: layers intercepted, the module itself unchanged."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta
from flax.errors import (
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
)

from .._errors import InputError, first_line
from .._tree import is_below, leaves_with_path
from .._typing import Array, Params
from ..lora import (
    KernelLayout,
    Layouts,
    box_adapters,
    leaf_shape,
    rule_for,
)
from ..quant import ReadAsArray
from ._contraction import contraction_of
from ._convolution import Convolution, convolution_of, convolved, is_linear_in_kernel
from ._product import ADAPTED, KNOWN, attended, looked_up, product
from ._reading import Reading, read_program


@dataclasses.dataclass(frozen=True)
class LoraLinen:
    """A Linen module that reads adapters and quantized weights from its params tree.

    `apply` takes what the module's own `apply` takes, with `combine(base_params, adapter)`
    as the params.  `Dense`, `DenseGeneral`, `Einsum`, `Conv`, `ConvTranspose` and `Embed` use the
    factored form; any other module that reads an adapted parameter gets W0 + scaling·A·B.  A
    function of your own under `nn.map_variables` finds boxes, which `nn.meta.unbox` opens.
    """

    module: nn.Module
    layouts_of_params: Layouts | None = None

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output with the adapter found in `variables["params"]`, if any.

        Args:
            variables: `{"params": combine(base_params, adapter), ...}`.
            *args, **kwargs: Passed on to `module.apply` (`rngs`, `method`, `mutable`, ...).

        Raises:
            InputError: if the adapter does not fit the base, or the base does not fit the module;
                if a module computes with a quantized or adapted parameter that it has not read by
                `self.param`.
        """
        boxed = box_adapters(variables.get("params", {}), self.layouts_of_params)
        with nn.intercept_methods(_intercept), _told(self.module):
            return self.module.apply({**variables, "params": boxed}, *args, **kwargs)

    def layouts(self, params: Params, *args: Any, **kwargs: Any) -> dict[str, KernelLayout]:
        """The layouts of all kernels the module uses, found by tracing it without computing.

        Args:
            params: The base's parameters.
            *args, **kwargs: Inputs as for `module.apply`, arrays or shapes.

        Returns:
            For every parameter that is multiplied, by path: its contracted axes, found in the
            program itself (none where it is used in another way), the window of a convolution,
            whether it holds experts, and the path of the `nn.scan` or `nn.vmap` it is stacked
            under.  For every such stack, by its path, a rule for what else is in it.  Rules given
            to `lora_linen` come first.

        Raises:
            InputError: if parameters are stacked twice, or along another axis than the first.

        Example:
            >>> model = nn.DenseGeneral((2, 3), name="query")
            >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
            >>> lora_linen(model).layouts(params, jnp.ones((1, 4)))["kernel"].contracting
            (0,)
        """
        recorder = _Recorder(params, self.layouts_of_params or {})
        # Collections such as batch statistics are not at hand: let the module make its own.
        # Random keys are no inputs: what comes of them and the parameters alone is no product.
        fixed = {"mutable": kwargs.pop("mutable", DenyList("params"))}
        fixed["rngs"] = kwargs.pop("rngs", {"params": jax.random.key(0)})

        def run(params: Params, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(recorder), _told(self.module):
                return self.module.apply({"params": params}, *args, **kwargs, **fixed)

        reading = read_program(run, params, *args, **kwargs)
        given, found = self.layouts_of_params or {}, recorder.layouts(reading)
        own = {
            p: dataclasses.replace(x, stack=rule_for(found, p).stack) if x.stack is None else x
            for p, x in given.items()
        }
        return {p: x for p, x in found.items() if rule_for(given, p).contracting is None} | own


def lora_linen(module: Any, *, layouts: Layouts | None = None) -> LoraLinen:
    """Let a Linen module use adapters and quantized weights, as it is.

    Args:
        module: Any Linen module.
        layouts: Only for adapted raw parameters (`self.param`) of more than two axes, and for
            matrices and experts that are not (d_in, d_out).

    Returns:
        An object whose `apply` has the module's signature.

    Raises:
        InputError: if `module` is no Linen module.

    Example:
        >>> from lora_jax import LoraConfig, combine, init_adapter
        >>> model, x = nn.Dense(3, name="head"), jnp.ones((2, 4))
        >>> base_params = model.init(jax.random.key(0), x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear")
        >>> adapter = init_adapter(jax.random.key(1), base_params, config)
        >>> lora_linen(model).apply({"params": combine(base_params, adapter)}, x).shape
        (2, 3)
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"lora_linen: takes a flax.linen.Module, not {type(module).__name__}; for NNX there is"
            " lora_nnx"
        )
    return LoraLinen(module, layouts)


@contextlib.contextmanager
def _told(module: nn.Module) -> Iterator[None]:
    """Flax's errors of parameters that are not the module's, as errors of input."""
    try:
        yield
    except (ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError) as error:
        raise InputError(
            f"the parameters are not those of this {type(module).__name__}: {first_line(error)}"
        ) from None


def _intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Replace a known layer's product; all it needs is in the params tree.

    Nothing may come from a closure: `nn.jit` reuses a trace when only a closure changed.
    """
    try:
        return _adapted_call(next_fun, args, kwargs, context.module, context.method_name)
    except ReadAsArray as error:
        where = f"{'/'.join(context.module.path) or 'the module'} ({type(context.module).__name__})"
        raise InputError(f"{where}: {error}") from None


def _adapted_call(
    next_fun: Callable, args: tuple, kwargs: dict, module: nn.Module, method: str
) -> Any:
    if isinstance(module, _NORMS) and method == "__call__" and _has_boxes(module.layer_instance):
        return _opened(module, args, kwargs)
    layer = _LOOK_UPS.get(method) if type(module) is nn.Embed else None
    name = "embedding" if layer else "kernel"
    if (layer or method == "__call__") and module.has_variable("params", name):
        param, inputs = module.get_variable("params", name), _inputs(args, kwargs)
        known = isinstance(param, KNOWN)
        if layer and known and inputs:
            return layer(module, param, *inputs)
        if not layer and known and inputs:
            out = _product(module, param, jnp.asarray(inputs[0]), inputs[1:])
            return next_fun(*args, **kwargs) if out is None else out
    return next_fun(*args, **kwargs)


_NORMS = (nn.WeightNorm, nn.SpectralNorm)
"""Modules that map every array of another's parameters: they must not find the parts of a box."""


def _has_boxes(module: nn.Module) -> bool:
    leaves = (leaf for _, leaf in leaves_with_path(module.variables.get("params", {})))
    return any(isinstance(leaf, KNOWN) for leaf in leaves)


def _opened(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """The module's output with dense weights in the place of all boxes below it."""

    def forward(module: nn.Module) -> Any:
        return module(*args, **kwargs)

    return nn.map_variables(forward, "params", meta.unbox)(module)


def _inputs(args: tuple, kwargs: dict) -> tuple:
    """A layer's arguments by position, however they were given."""
    named = (kwargs[name] for name in ("inputs", "query", "einsum_str") if name in kwargs)
    return (*args, *named)


def _product(module: Any, param: Any, x: Array, rest: tuple[Any, ...]) -> Array | None:
    """The layer's output in factored form; None where only the dense weight will do."""
    if (convolution := convolution_of(module)) is not None:
        return _convolution(module, param, x, convolution)
    contraction = contraction_of(module, x.ndim, rest)
    if contraction is None:
        return None
    bias = module.get_variable("params", "bias") if module.use_bias else None
    promote = functools.partial(module.promote_dtype, dtype=module.dtype)
    return product(param, x, contraction, bias, promote, module.precision)


def _convolution(module: Any, param: Any, x: Array, convolution: Convolution) -> Array | None:
    """As `_product`, for a convolution."""
    if not isinstance(param, ADAPTED):
        return None
    bias = module.get_variable("params", "bias") if module.use_bias else None
    if not is_linear_in_kernel(module):
        own = {"kernel": convolution.adapted(param).unbox(), "bias": bias}
        return module.clone(parent=None).apply({"params": own}, x)

    def convolve(x: Array, kernel: Array) -> Array:
        width = kernel.shape[-2] if convolution.turned else kernel.shape[-1]
        layer = module.clone(parent=None, features=width, use_bias=False)
        return layer.apply({"params": {"kernel": kernel}}, x)

    promote = functools.partial(module.promote_dtype, dtype=module.dtype)
    return convolved(param, x, convolution, bias, promote, convolve)


def _look_up(module: Any, param: Any, ids: Array) -> Array:
    promote = functools.partial(module.promote_dtype, dtype=module.dtype, inexact=False)
    return looked_up(param, ids, promote)


def _attend(module: Any, param: Any, query: Array) -> Array:
    return attended(param, query, functools.partial(module.promote_dtype, dtype=module.dtype))


_LOOK_UPS = {"__call__": _look_up, "attend": _attend}


class _Recorder:
    """An interceptor that changes nothing and notes under which modules parameters are stacked."""

    def __init__(self, params: Params, given: Layouts) -> None:
        self.shapes = {path: leaf_shape(leaf)[0] for path, leaf in leaves_with_path(params)}
        self.given = given
        self.stacks: set[str] = set()

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, prefix = context.module, "/".join(context.module.path)
        for name, value in leaves_with_path(module.variables.get("params", {})):
            path = f"{prefix}/{name}" if prefix else name
            outside, (here, _) = self.shapes.get(path, ()), leaf_shape(value)
            # A leaf that lost its leading axis is seen from inside a scan: the outermost such
            # module is the scanned one.
            if len(here) < len(outside):
                _check_stack(path, here, outside, rule_for(self.given, path).experts)
                self.stacks.add(prefix)
        return next_fun(*args, **kwargs)

    def layouts(self, reading: Reading) -> dict[str, KernelLayout]:
        """One for every parameter that is multiplied, and one for whatever else is in a stack."""

        def stack_of(path: str) -> str | None:
            above = [s for s in self.stacks if path != s and is_below(path, s)]
            return min(above, key=len, default=None)

        def layout(path: str, use: KernelLayout) -> KernelLayout:
            stack = stack_of(path)
            # What nn.vmap makes of modules looks like experts from inside a product.
            found = use.experts and (stack is None or path in reading.stacked)
            experts = found or rule_for(self.given, path).experts
            lead = (stack is not None) + experts
            axes = tuple(axis - lead for axis in use.contracting or ())
            return dataclasses.replace(use, contracting=axes, stack=stack, experts=experts)

        outermost = sorted(s for s in self.stacks if stack_of(s) is None)
        stacks = {s: KernelLayout(stack=s) for s in outermost}
        found = {path: layout(path, use) for path, use in reading.uses.items()}
        return stacks | {
            path: own
            for path, own in found.items()
            if own.contracting or len(self.shapes[path]) - own.leading_axes > 2
        }


def _check_stack(
    path: str, inside: tuple[int, ...], outside: tuple[int, ...], experts: bool
) -> None:
    if inside != outside[1:] and not (experts and inside == outside[2:]):
        raise InputError(
            f"{path}: stacked from {inside} to {outside}; adapters need one stack, along the first"
            " axis (variable_axes={'params': 0}), or experts in it that a rule names:"
            f' lora_linen(module, layouts={{"{path}": KernelLayout(experts=True)}})'
        )
