"""Nested parameter dicts: paths, `partition`, `combine`, and stacked layers' names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax

from ._typing import Params

Mask = Mapping[str, Any] | Callable[[str], bool]


def leaves_with_path(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) in order; a leaf is whatever is not a mapping.

    Example:
        >>> list(leaves_with_path({"q_proj": {"kernel": 1}, "norm": 2}))
        [('q_proj/kernel', 1), ('norm', 2)]
    """
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from leaves_with_path(value, path)
        else:
            yield path, value


def tree_from_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with these leaves, keyed by path.

    Example:
        >>> tree_from_paths({"q_proj/kernel": 1, "norm": 2})
        {'q_proj': {'kernel': 1}, 'norm': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Params, prefix: str = "") -> Params:
    """Apply `function(path, leaf)` to every leaf; mappings keep their type, empty ones too.

    Example:
        >>> map_with_path(lambda path, x: path, {"a": {"b": 1}})
        {'a': {'b': 'a/b'}}
    """
    mapped = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        inner = isinstance(value, Mapping)
        mapped[name] = map_with_path(function, value, path) if inner else function(path, value)
    # Flax's FrozenDict stays one; what is a dict already may need more to be made.
    return mapped if isinstance(tree, dict) else type(tree)(mapped)  # type: ignore[call-arg]


def partition(tree: Params, mask: Mask) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree in two: the leaves where `mask` is true, and the others.

    Args:
        tree: Nested mapping of parameters.
        mask: A mapping of the same structure with booleans (see `trainable_mask`), or a
            function from a leaf's path to a boolean.

    Returns:
        (selected, rest): nested dicts that hold only their own leaves; `combine(rest,
        selected)` is the tree again.

    Raises:
        AssertionError: if a mask of booleans has another structure.

    Example:
        >>> partition({"a": {"kernel": 1, "lora_A": 2}}, lambda path: path.endswith("lora_A"))
        ({'a': {'lora_A': 2}}, {'a': {'kernel': 1}})
    """
    if callable(mask):
        chosen = mask
    else:
        chosen = dict(leaves_with_path(mask)).__getitem__
        # Whatever is no mapping is one leaf here, a quantized tensor too.
        bare = [tree_from_paths(dict.fromkeys(dict(leaves_with_path(t)), 0)) for t in (tree, mask)]
        chex.assert_trees_all_equal_structs(*bare)
    selected = {path for path, _ in leaves_with_path(tree) if chosen(path)}
    return _select(tree, selected.__contains__), _select(tree, lambda path: path not in selected)


def _select(tree: Params, chosen: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """The leaves whose paths are chosen, under the names they have: Flax's may hold a "/"."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            if below := _select(value, chosen, path):
                kept[name] = below
        elif chosen(path):
            kept[name] = value
    return kept


def combine(base: Params, overlay: Params) -> dict[str, Any]:
    """Lay one tree over another: the leaves of both, `overlay`'s where both have one.

    `combine(base_params, adapter)` puts `lora_A`, `lora_B` and `lora_scaling` beside the
    `kernel` they belong to; neither argument is changed and no array is copied.

    Raises:
        ValueError: where one tree has a leaf and the other a subtree.

    Example:
        >>> combine({"a": {"kernel": 1}}, {"a": {"lora_A": 2}})
        {'a': {'kernel': 1, 'lora_A': 2}}
    """
    return _combine(base, overlay, "")


def _combine(base: Params, overlay: Params, prefix: str) -> dict[str, Any]:
    merged = dict(base)
    for name, value in overlay.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if name not in merged:
            if isinstance(value, Mapping) and any(k.startswith(f"{name}/") for k in merged):
                raise ValueError(
                    f"combine: the base has parameters whose own names begin with {path}/ (as those"
                    " of nn.WeightNorm do), and no tree of paths can lie over them; leave them out"
                )
            merged[name] = value
        elif isinstance(value, Mapping) != isinstance(merged[name], Mapping):
            raise ValueError(f"combine: {path} is a leaf in one tree and a subtree in the other")
        else:
            merged[name] = (
                _combine(merged[name], value, path) if isinstance(value, Mapping) else value
            )
    return merged


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of the arrays that its shapes stand for.

    Example:
        >>> import jax
        >>> tree_bytes({"a": jax.ShapeDtypeStruct((2, 3), "bfloat16")})
        12
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def layer_paths(path: str, stack: str | None, count: int) -> list[str]:
    """Paths of the single layers behind a stacked one: the number follows the stack's path.

    Args:
        path: Path below the stack, as in the tree.
        stack: Path whose leaves carry a leading layer axis, or None for a single module.
        count: Number of layers.

    Example:
        >>> layer_paths("model/layers/self_attn/q_proj", "model/layers", 2)
        ['model/layers/0/self_attn/q_proj', 'model/layers/1/self_attn/q_proj']
        >>> layer_paths("lm_head", None, 1)
        ['lm_head']
    """
    if stack is None:
        return [path]
    above = f"{stack}/" if stack else ""
    below = f"/{path.removeprefix(above)}" if path != stack else ""
    return [f"{above}{i}{below}" for i in range(count)]


def is_below(path: str, parent: str) -> bool:
    """Whether `path` is `parent` or lies below it; everything lies below the root, `""`.

    Example:
        >>> is_below("layers/q_proj", "layers"), is_below("layers_1", "layers")
        (True, False)
    """
    return not parent or path == parent or path.startswith(f"{parent}/")


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, as ones that differ between the same devices of a mesh.

    Under `jax.shard_map` JAX knows which arrays do, and sums the gradients of those that do not.  A
    derivative of our own has to be told: all its arguments and gradients are of one kind then.

    Example:
        >>> import jax.numpy as jnp
        >>> [x.shape for x in vary_together(jnp.ones(3), jnp.ones(()))]
        [(3,), ()]
    """
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset[Any]().union(*own)
    return tuple(
        jax.lax.pcast(x, tuple(every - axes), to="varying") if every - axes else x
        for x, axes in zip(arrays, own, strict=True)
    )
