"""What layers are given and how their weights would move, gathered over batches of data.

Nothing of the model is rewritten.  A leaf of zeros beside each kernel goes with it into whatever
`nn.scan` and `nn.remat` its layer is in; the layer's input passes by it unchanged; and the
"gradient" of the leaf, as its own derivative rule has it, is the input's second moments.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from .._tree import combine, leaves_with_path, tree_from_paths
from .._typing import Array, Params
from ..lora import Target
from ..quant import QuantizedTensor
from ..transform import contraction_of

_MOMENTS, _SCALED, _MASK = "kernel_moments", "kernel_scaled_moments", "kernel_mask"

Forward = Callable[[Params, Any], Any]
"""From parameters and a batch to whatever depends on all layers that are watched."""


def input_moments(
    forward: Forward,
    base_params: Params,
    targets: tuple[Target, ...],
    batches: Iterable[Any],
    mask_of: Callable[[Any], Array | None],
    *,
    scaled: bool = False,
    where: str,
) -> Iterator[dict[str, np.ndarray]]:
    """The second moments of every target's inputs, summed over the batches so far.

        M = Σ [x 1]ᵀ·[x 1]    over tokens

    Args:
        forward: Runs the model by `lora_linen(module).apply` or by its own `apply`.
        base_params: Dense or quantized.
        targets: Kernels of Dense, DenseGeneral or Einsum layers.
        batches: Whatever `forward` takes.
        mask_of: From a batch to which tokens count, the leading axes of all inputs; None: all.
        scaled: Divide the inputs of each call by |max x|, and count calls in M's last element.
        where: The function that errors name.

    Yields:
        After each batch, by path of kernel in the order of use: (layers, d_in + 1, d_in + 1) in
        float32.

    Raises:
        InputError: if there is no batch, no token that counts, an input that is not finite, or a
            target that is no such layer.
    """
    watcher = _Watcher()

    @jax.jit
    def moments_of(params: Params, batch: Any, mask: Array | None) -> dict[str, Array]:
        def run(leaves: Mapping[str, Array]) -> Array:
            watched = leaves if mask is None else {**leaves, **_masks(targets, mask)}
            with nn.intercept_methods(watcher):
                out = forward(combine(params, tree_from_paths(watched)), batch)
            # Any sum that has a derivative will do: the rule below does not read its cotangent.
            return sum((jnp.sum(x, dtype=jnp.float32) for x in _floats(out)), jnp.float32(0))

        return jax.grad(run)({path: jnp.zeros(shape) for path, shape in shapes.items()})

    if raw := [t.path for t in targets if t.path.rpartition("/")[2] != "kernel"]:
        raise InputError(
            f"{where}: {raw[0]}: inputs are watched of kernels of Dense, DenseGeneral and Einsum"
            " layers alone; take it out of target_modules or target_parameters"
        )
    if several := [t.path for t in targets if t.experts is not None]:
        raise InputError(
            f"{where}: {several[0]}: which of its inputs an expert sees is not watched; take it out"
            " of target_modules"
        )
    shapes = {_beside(t.path, _SCALED if scaled else _MOMENTS): _shape(t) for t in targets}
    total: dict[str, np.ndarray] = {}
    for number, batch in enumerate(batches):
        found = moments_of(base_params, batch, mask_of(batch))
        for target, leaf in zip(targets, shapes, strict=True):
            moments = np.asarray(found[leaf]).reshape(-1, target.d_in + 1, target.d_in + 1)
            if not np.isfinite(moments).all():
                raise InputError(
                    f"{where}: batch {number}: an input of {target.path} is not finite; look at the"
                    " weights and at this batch"
                )
            total[target.path] = total.get(target.path, 0.0) + moments
        yield dict(sorted(total.items(), key=lambda item: watcher.order(item[0])))
    if not total:
        raise InputError(f"{where}: no batch was given; give at least one")


def check_seen(moments: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse targets whose inputs no token of any batch reached.

    Raises:
        InputError: naming the first such target.
    """
    unseen = [path for path, x in moments.items() if not x[..., -1, -1].all()]
    if len(unseen) == len(moments):
        raise InputError(
            f"{where}: the batches hold no token that counts; every one is masked, by labels or as"
            " padding: give others, or set use_label_mask to false"
        )
    if unseen:
        raise InputError(
            f"{where}: {unseen[0]}: its inputs were not seen; what is watched are Dense,"
            " DenseGeneral and Einsum layers that the output depends on: exclude it"
        )


def refuse_quantized(targets: tuple[Target, ...], base_params: Params) -> None:
    """Refuse a start from the weights themselves where they are known by their codes alone."""
    params = dict(leaves_with_path(base_params))
    for target in targets:
        if isinstance(params[target.path], QuantizedTensor):
            raise InputError(
                f"{target.path}: is quantized already, and this start moves the weights; give the"
                " dense ones"
            )


def mean_gradients(
    loss: Callable[[Params, Any], Array],
    base_params: Params,
    targets: tuple[Target, ...],
    batches: Iterable[Any],
    where: str,
) -> dict[str, Array]:
    """The gradient of the loss by every target, by path, in float32: the mean over batches.

    Raises:
        InputError: if there is no batch, or a loss or gradient that is not finite.
    """
    params = dict(leaves_with_path(base_params))
    kernels = {t.path: params[t.path] for t in targets}

    @jax.jit
    def gradients(kernels: Mapping[str, Array], params: Params, batch: Any):
        def of(kernels: Mapping[str, Array]) -> Array:
            return loss(combine(params, tree_from_paths(kernels)), batch)

        value, found = jax.value_and_grad(of)(kernels)
        found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
        finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), found)
        return found, jnp.isfinite(value), finite

    total, count = {}, 0
    for batch in batches:
        found, loss_finite, finite = gradients(kernels, base_params, batch)
        bad = [path for path, good in finite.items() if not good]
        if bad or not loss_finite:
            what = "the loss" if not loss_finite else f"the gradient of {bad[0]}"
            raise InputError(
                f"{where}: batch {count}: {what} is not finite; look at the weights and at this"
                " batch"
            )
        total = jax.tree.map(jnp.add, total, found) if count else found
        count += 1
    if not count:
        raise InputError(f"{where}: no batch was given; give at least one")
    return {path: x / count for path, x in total.items()}


class _Watcher:
    """An interceptor that lets inputs pass by the leaves beside their kernels."""

    def __init__(self) -> None:
        self.uses: dict[str, int] = {}

    def order(self, path: str) -> int:
        """When a kernel was used first."""
        return self.uses.get(path, len(self.uses))

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        names = [n for n in (_MOMENTS, _SCALED) if module.has_variable("params", n)]
        if context.method_name == "__call__" and names:
            others, named, x, rest = _first_input(args, kwargs)
            contraction = contraction_of(module, x.ndim, rest)
            if contraction is not None:
                path = "/".join((*module.path, "kernel"))
                self.uses.setdefault(path, len(self.uses))
                mask = _mask_of(module, path, x, contraction.inputs)
                leaf = module.get_variable("params", names[0])
                x = _pass(names[0] == _SCALED, contraction.inputs, x, leaf, mask)
                return next_fun(x, *others, **named)
        return next_fun(*args, **kwargs)


def _first_input(args: tuple, kwargs: dict) -> tuple[tuple, dict, Array, tuple]:
    """The arguments without the layer's input, the input, and what tells its contraction."""
    rest = {name: value for name, value in kwargs.items() if name != "inputs"}
    x, *more = args if args else (kwargs["inputs"],)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):  # which has no derivative to carry
        x = x.astype(jnp.float32)
    spelled = (kwargs["einsum_str"],) if "einsum_str" in kwargs else ()
    return tuple(more), rest, x, (*more, *spelled)


def _mask_of(module: Any, path: str, x: Array, contracted: tuple[int, ...]) -> Array:
    """Which of the layer's input vectors count, in the shape of the input's free axes."""
    free = tuple(n for i, n in enumerate(x.shape) if i not in contracted)
    if not module.has_variable("params", _MASK):
        return jnp.ones(free)
    mask = module.get_variable("params", _MASK)
    if free[: mask.ndim] != mask.shape:
        raise InputError(
            f"{path}: its input {x.shape} has no axes {mask.shape} for the batch's mask; exclude"
            " this module, or give batches without masks"
        )
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(free) - mask.ndim)), free)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pass(scaled: bool, contracted: tuple[int, ...], x: Array, leaf: Array, mask: Array) -> Array:
    return x


def _forward(scaled: bool, contracted: tuple[int, ...], x: Array, leaf: Array, mask: Array):
    return x, (x, mask)


def _backward(scaled: bool, contracted: tuple[int, ...], kept: Any, g: Array):
    x, mask = kept
    free = tuple(i for i in range(x.ndim) if i not in contracted)
    counts = mask.reshape(-1, 1) != 0
    rows = x.transpose(*free, *contracted).reshape(len(counts), -1).astype(jnp.float32)
    if scaled:
        largest = jnp.abs(jnp.max(jnp.where(counts, rows, -jnp.inf)))
        moments = jnp.pad(_gram(jnp.where(counts, rows / largest, 0.0)), (0, 1)).at[-1, -1].set(1.0)
    else:
        with_one = jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1.0)
        moments = _gram(jnp.where(counts, with_one, 0.0))
    return g, moments, jnp.zeros_like(mask)


_pass.defvjp(_forward, _backward)


def _gram(rows: Array) -> Array:
    # On TPU a default float32 product is rounded to bfloat16.
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def _beside(kernel_path: str, name: str) -> str:
    module = kernel_path.rpartition("/")[0]
    return f"{module}/{name}" if module else name


def _shape(target: Target) -> tuple[int, ...]:
    stack = (len(target.names),) if target.stacked else ()
    return (*stack, target.d_in + 1, target.d_in + 1)


def _masks(targets: tuple[Target, ...], mask: Array) -> dict[str, Array]:
    """The mask as a leaf beside each kernel, stacked as it is."""
    mask = mask.astype(jnp.float32)
    stacks = {t.path: (len(t.names),) if t.stacked else () for t in targets}
    return {
        _beside(path, _MASK): jnp.broadcast_to(mask, (*stack, *mask.shape))
        for path, stack in stacks.items()
    }


def _floats(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
