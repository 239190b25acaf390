"""Any Linen module with its adapter: layers intercepted, the module itself unchanged."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta

from .._errors import InputError
from .._tree import is_below, leaves_with_path
from .._typing import Array, Params
from ..lora import (
    KernelLayout,
    Layouts,
    LoraParam,
    RowParam,
    TokenParam,
    as_matrix,
    base_product,
    box_adapters,
    check_shapes,
    leaf_shape,
    rule_for,
)
from ..quant import QuantizedTensor, look_up, quantized_matmul
from ._contraction import contraction_of
from ._convolution import Convolution, convolution_of, convolve, is_linear_in_kernel

ADAPTED = (LoraParam, RowParam)
"""A parameter with one adapter, or with one for each row of a batch."""
KNOWN = (*ADAPTED, TokenParam, QuantizedTensor)
"""Boxes that layers open themselves."""


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
            InputError: if the adapter does not fit the base.
        """
        boxed = box_adapters(variables.get("params", {}), self.layouts_of_params)
        with nn.intercept_methods(_intercept):
            return self.module.apply({**variables, "params": boxed}, *args, **kwargs)

    def layouts(self, params: Params, *args: Any, **kwargs: Any) -> dict[str, KernelLayout]:
        """The layouts of all kernels the module uses, found by tracing it without computing.

        Args:
            params: The base's parameters.
            *args, **kwargs: Inputs as for `module.apply`, arrays or shapes.

        Returns:
            For every kernel, by path: its contracted axes (Dense, DenseGeneral, Einsum and
            Embed, and with window and groups Conv and ConvTranspose), and the path of the
            `nn.scan` or `nn.vmap` it is stacked under.  For every such stack, by its path, a rule
            for what else is in it.
            Rules given to `lora_linen` come first.

        Raises:
            InputError: if parameters are stacked twice, or along another axis than the first.

        Example:
            >>> model = nn.DenseGeneral((2, 3), name="query")
            >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
            >>> lora_linen(model).layouts(params, jnp.ones((1, 4)))["kernel"].contracting
            (0,)
        """
        shapes = {p: leaf_shape(x)[0] for p, x in leaves_with_path(params)}
        recorder = _Recorder(shapes, self.layouts_of_params or {})
        # Collections such as batch statistics are not at hand: let the module make its own.
        own = {"mutable": DenyList("params"), "rngs": {"params": jax.random.key(0)}}
        kwargs = {**own, **kwargs}

        # Arrays and shapes are traced; flags, strings and functions stay as they are.
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

        def trace(params: Params, traced: dict[int, Any]) -> Any:
            given = [traced.get(i, leaf) for i, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, given)
            with nn.intercept_methods(recorder):
                return self.module.apply({"params": params}, *args, **kwargs)

        jax.eval_shape(trace, params, traced)
        given, found = self.layouts_of_params or {}, recorder.layouts()
        own = {
            p: dataclasses.replace(x, stack=rule_for(found, p).stack) if x.stack is None else x
            for p, x in given.items()
        }
        return {p: x for p, x in found.items() if rule_for(given, p).contracting is None} | own


def lora_linen(module: nn.Module, *, layouts: Layouts | None = None) -> LoraLinen:
    """Let a Linen module use adapters and quantized weights, as it is.

    Args:
        module: Any Linen module.
        layouts: Only for adapted raw parameters (`self.param`) of more than two axes, and for
            matrices and experts that are not (d_in, d_out).

    Returns:
        An object whose `apply` has the module's signature.

    Example:
        >>> from lora_jax import LoraConfig, combine, init_adapter
        >>> model, x = nn.Dense(3, name="head"), jnp.ones((2, 4))
        >>> base_params = model.init(jax.random.key(0), x)["params"]
        >>> config = LoraConfig(r=2, target_modules="all-linear")
        >>> adapter = init_adapter(jax.random.key(1), base_params, config)
        >>> lora_linen(model).apply({"params": combine(base_params, adapter)}, x).shape
        (2, 3)
    """
    return LoraLinen(module, layouts)


def _intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Replace a known layer's product; all it needs is in the params tree.

    Nothing may come from a closure: `nn.jit` reuses a trace when only a closure changed.
    """
    module, method = context.module, context.method_name
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
    if contraction is None or (isinstance(param, TokenParam) and contraction.kernel != (0,)):
        return None
    base = param.base if isinstance(param, (*ADAPTED, TokenParam)) else param
    if not _is_matrix(base, contraction.kernel):
        base = meta.unbox(base)
    kernel = _as_matrix(base, contraction.kernel)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, _, bias = module.promote_dtype(
        x, jnp.zeros((), base.dtype), meta.unbox(bias), dtype=module.dtype
    )
    free = tuple(i for i in range(x.ndim) if i not in contraction.inputs)
    features = tuple(i for i in range(base.ndim) if i not in contraction.kernel)
    flat = x.transpose(*free, *contraction.inputs).reshape(*(x.shape[i] for i in free), -1)
    if isinstance(param, ADAPTED):
        check_shapes(dataclasses.replace(param, contracting=contraction.kernel))
        y = param.linear(flat, kernel, module.precision)
    elif isinstance(param, TokenParam):
        product = base_product(flat, kernel, module.precision)
        y = param.outputs(flat, product, module.precision)
    elif isinstance(kernel, QuantizedTensor):
        y = quantized_matmul(flat, kernel, precision=module.precision)
    else:
        return None
    y = y.reshape(*(x.shape[i] for i in free), *(base.shape[i] for i in features))
    y = y.transpose(contraction.output)
    if bias is None:
        return y
    shape = [n if i >= len(free) else 1 for i, n in zip(contraction.output, y.shape, strict=True)]
    return y + bias.reshape(shape)


def _convolution(module: Any, param: Any, x: Array, convolution: Convolution) -> Array | None:
    """As `_product`, for a convolution."""
    if not isinstance(param, ADAPTED):
        return None
    param = dataclasses.replace(param, contracting=convolution.contracting)
    check_shapes(param)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    if not is_linear_in_kernel(module):
        own = {"kernel": param.unbox(), "bias": bias}
        return module.clone(parent=None).apply({"params": own}, x)
    base = meta.unbox(param.base)
    x, _, bias = module.promote_dtype(
        x, jnp.zeros((), base.dtype), meta.unbox(bias), dtype=module.dtype
    )
    kernel = as_matrix(base, convolution.contracting)
    # Rows that have an adapter each are those of the first axis: a single example gets one.
    lacking = max(len(convolution.window) + 2 - x.ndim, 0)
    one = functools.partial(convolve, module, convolution)
    y = param.convolution(x.reshape(*(1,) * lacking, *x.shape), kernel, one, convolution.groups)
    y = y.reshape(y.shape[lacking:])
    return y if bias is None else y + bias


def _is_matrix(base: Any, contracting: tuple[int, ...]) -> bool:
    """Whether a quantized kernel is flattened as this layer needs it: that cannot be changed."""
    return isinstance(base, QuantizedTensor) and contracting == base.contracting


def _as_matrix(base: Any, contracting: tuple[int, ...]) -> Any:
    """The kernel as (d_in, d_out)."""
    if isinstance(base, QuantizedTensor):
        return base
    return as_matrix(base, contracting)


def _look_up(module: Any, param: Any, ids: Array) -> Array:
    base = param.base if isinstance(param, (*ADAPTED, TokenParam)) else param
    empty = jnp.zeros((), base.dtype)
    (empty,) = module.promote_dtype(empty, dtype=module.dtype, inexact=False)
    if _is_matrix(base, (1,)):
        rows = look_up(base, ids, empty.dtype)
    else:
        rows = jnp.take(meta.unbox(base).astype(empty.dtype), ids, axis=0)
    if isinstance(param, TokenParam):
        return param.rows(jnp.asarray(ids), rows)
    if not isinstance(param, ADAPTED):
        return rows
    return param.look_up(jnp.asarray(ids), rows, meta.unbox(base))


def _attend(module: Any, param: Any, query: Array) -> Array:
    base = param.base if isinstance(param, (*ADAPTED, TokenParam)) else param
    if isinstance(param, ADAPTED) and param.untied:
        param = base
    query, _ = module.promote_dtype(query, jnp.zeros((), base.dtype), dtype=module.dtype)
    if isinstance(param, ADAPTED):
        query = param.scaled(query, meta.unbox(base))
    if _is_matrix(base, (1,)):
        logits = quantized_matmul(query, base)
    else:
        logits = jnp.dot(query, meta.unbox(base).astype(query.dtype).T)
    if isinstance(param, TokenParam):
        return param.outputs(query, logits)
    return logits + param.transposed(query) if isinstance(param, ADAPTED) else logits


_LOOK_UPS = {"__call__": _look_up, "attend": _attend}


class _Recorder:
    """An interceptor that changes nothing and notes what every kernel's axes mean."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], given: Layouts) -> None:
        self.shapes = shapes
        self.given = given
        self.stacks: set[str] = set()
        self.contracting: dict[str, tuple[int, ...]] = {}
        self.convolutions: dict[str, Convolution] = {}

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, prefix = context.module, "/".join(context.module.path)
        inside = dict(leaves_with_path(module.variables.get("params", {})))
        for name, value in inside.items():
            path = f"{prefix}/{name}" if prefix else name
            outside, (here, _) = self.shapes.get(path, ()), leaf_shape(value)
            # A leaf that lost its leading axis is seen from inside a scan: the outermost such
            # module is the scanned one.
            if len(here) < len(outside):
                _check_stack(path, here, outside, rule_for(self.given, path).experts)
                self.stacks.add(prefix)
        if context.method_name == "__call__" and (inputs := _inputs(args, kwargs)):
            self._note(module, prefix, inputs, inside)
        return next_fun(*args, **kwargs)

    def _note(self, module: nn.Module, prefix: str, args: tuple, inside: dict[str, Any]) -> None:
        name = "embedding" if type(module) is nn.Embed else "kernel"
        if name not in inside:
            return
        if (convolution := convolution_of(module)) is not None:
            self.convolutions[f"{prefix}/{name}" if prefix else name] = convolution
            return
        contracting: tuple[int, ...] = (0,)
        if type(module) is not nn.Embed:
            contraction = contraction_of(module, jnp.ndim(args[0]), args[1:])
            if contraction is None and len(leaf_shape(inside[name])[0]) <= 2:
                return
            contracting = contraction.kernel if contraction else ()
        self.contracting[f"{prefix}/{name}" if prefix else name] = contracting

    def layouts(self) -> dict[str, KernelLayout]:
        """One for every kernel, and one for whatever else stands in a stack."""

        def stack_of(path: str) -> str | None:
            above = [s for s in self.stacks if path != s and is_below(path, s)]
            return min(above, key=len, default=None)

        outermost = sorted(s for s in self.stacks if stack_of(s) is None)
        stacks = {s: KernelLayout(stack=s) for s in outermost}
        kernels = {
            p: KernelLayout(axes, stack_of(p), rule_for(self.given, p).experts)
            for p, axes in self.contracting.items()
        }
        convolutions = {
            p: KernelLayout(c.contracting, stack_of(p), window=c.window, groups=c.groups)
            for p, c in self.convolutions.items()
        }
        return stacks | kernels | convolutions


def _check_stack(
    path: str, inside: tuple[int, ...], outside: tuple[int, ...], experts: bool
) -> None:
    if inside != outside[1:] and not (experts and inside == outside[2:]):
        raise InputError(
            f"{path}: stacked from {inside} to {outside}; adapters need one stack, along the first"
            " axis (variable_axes={'params': 0}), or experts in it that a rule names:"
            f' lora_linen(module, layouts={{"{path}": KernelLayout(experts=True)}})'
        )
