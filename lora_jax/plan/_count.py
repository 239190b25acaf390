"""What a traced step computes and keeps, counted in its jaxpr: the same for every machine."""

import collections
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Counts:
    """FLOPs by the dtype of the operands, and bytes kept from one loop for a later one.

    `kept` are on the device, `kept_on_host` in the host's memory.
    """

    flops: dict[str, int]
    kept: int
    kept_on_host: int


def count(jaxpr: Any) -> Counts:
    """The multiplications of a jaxpr, and what its forward loops keep for its backward loops.

    A product of (m, k) and (k, n) is 2·m·k·n FLOPs; what is in a loop counts once for each turn.
    What is not a product of matrices is not counted, nor what a kernel does in its grid, nor the
    turns of a `while`; of alternatives the one with most counts: the loss skips chunks of tokens
    that are not trained on, and a step may train on all of its tokens.

    Args:
        jaxpr: A `ClosedJaxpr`, as `jax.make_jaxpr` gives.

    Example:
        >>> import jax.numpy as jnp
        >>> count(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))).flops
        {'float32': 60}
    """
    flops = _products(jaxpr.jaxpr)
    kept = [aval for aval in _kept(jaxpr.jaxpr)]
    host = sum(_bytes(aval) for aval in kept if aval.memory_space == jax.memory.Space.Host)
    return Counts(dict(flops), sum(map(_bytes, kept)) - host, host)


def _products(jaxpr: Any) -> collections.Counter[str]:
    """FLOPs of all products of matrices; of alternatives those of the one that has most."""
    flops: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            flops[eqn.invars[0].aval.dtype.name] += _flops(eqn)
        found = [_products(inner) for inner in _inner(eqn)]
        if eqn.primitive.name == "cond":
            found = [max(found, key=lambda branch: branch.total())]
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in found:
            flops.update({dtype: turns * count for dtype, count in inner.items()})
    return flops


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    if eqn.primitive.name.startswith("custom_"):
        # Functions for their derivatives lie beside what is computed.
        bodies = [eqn.params.get(name) for name in ("call", "call_jaxpr", "fun_jaxpr")]
        return [_open(body) for body in bodies if body is not None][:1]
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [_open(x) for x in leaves if _is_jaxpr(x)]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _open(x: Any) -> Any:
    return x.jaxpr if isinstance(x, core.ClosedJaxpr) else x


def _flops(eqn: Any) -> int:
    left, right = (var.aval for var in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted)
    features = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * eqn.outvars[0].aval.size * (right.size // right.shape[features])


def _kept(jaxpr: Any) -> list[Any]:
    """Stacked results of one scan that another takes, at the depth where most of them live."""
    here, made = [], set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "scan":
            continue
        variables = (var for var in eqn.invars if not isinstance(var, core.Literal))
        here += [var for var in dict.fromkeys(variables) if var in made]
        # What a scan stacks has an axis more than what its body gives.
        body = _open(eqn.params["jaxpr"])
        pairs = zip(eqn.outvars, body.outvars, strict=True)
        made |= {outer for outer, inner in pairs if outer.aval.ndim > inner.aval.ndim}
    here = [var.aval for var in dict.fromkeys(here)]
    deeper = [_kept(inner) for eqn in jaxpr.eqns for inner in _inner(eqn)]
    return max([here, *deeper], key=lambda avals: sum(map(_bytes, avals)))


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize
