"""Single rows of an embedding or a head that are trained: PEFT's `trainable_token_indices`."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Float, Int

from .._config import LoraConfig
from .._errors import InputError, nearest
from .._tree import leaves_with_path
from .._typing import Array, Params
from ..quant import QuantizedTensor, ReadAsArray, dequantize, look_up
from ._layout import Layouts, rule_for
from ._target import LAYER_PARAMS, is_saved, is_within, target_name
from ._targets import adapter_names, is_embedding, leaf_shape, token_names
from ._tied import embedding_of, shared_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenParam(meta.AxisMetadata):
    """A frozen table and the rows that stand in the place of some of its own, as one leaf.

    Layers that know it compute with the table as it is and replace a few outputs, so that no
    gradient is ever as large as the table.  Any other module opens the box to the dense table.

    Args:
        base: An embedding (vocabulary, d), or the kernel (d, vocabulary) of a head.
        tokens: The trained rows (n, d): the rows themselves, not what is added to old ones.
        ids: Which rows they are (n,): whole numbers, in float32 so that `jax.grad` takes an
            adapter as it is.
    """

    base: Any
    tokens: Array
    ids: Array
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def token_ids(self) -> Int[Array, " n"]:
        return jnp.rint(jax.lax.stop_gradient(self.ids)).astype(jnp.int32)

    def unbox(self) -> Array:
        return self.merged()

    @property
    def T(self) -> Array:
        """The transpose, as a head has it that takes the table out of `module.variables`."""
        return self.merged().T

    def merged(self, dtype: Any = None) -> Array:
        """The dense table with the rows in it, in the base's dtype by default."""
        _, own = leaf_shape(self.base)
        dense = _dense(self.base).astype(own if dtype is None else dtype)
        tokens = self.tokens.astype(dense.dtype)
        if is_embedding(self.path):
            return dense.at[self.token_ids].set(tokens)
        return dense.at[:, self.token_ids].set(tokens.T)

    def rows(self, ids: Array, rows: Array) -> Array:
        """What the table gives for `ids`, given what its base does."""
        vocabulary = leaf_shape(self.base)[0][0]
        return replace_rows(
            jnp.where(ids < 0, ids + vocabulary, ids), rows, self.token_ids, self.tokens
        )

    def outputs(self, x: Array, y: Array, precision: Any = None) -> Array:
        """The layer's outputs (..., vocabulary) for inputs (..., d), given its base's."""
        own = jnp.dot(x, self.tokens.astype(x.dtype).T, precision=precision)
        return y.at[..., self.token_ids].set(own.astype(y.dtype), unique_indices=True)

    def __jax_array__(self) -> Array:
        raise ReadAsArray(f"the adapted {self.path} is used as an array; read it by self.param")

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "TokenParam":
        return dataclasses.replace(self, base=meta.add_axis(self.base, index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "TokenParam":
        return dataclasses.replace(self, base=meta.remove_axis(self.base, index, params))


def replace_rows(
    ids: Int[Array, "*batch"],
    rows: Float[Array, "*batch d"],
    token_ids: Int[Array, " n"],
    tokens: Float[Array, "n d"],
) -> Float[Array, "*batch d"]:
    """`tokens[j]` wherever `ids` is `token_ids[j]`, and `rows` elsewhere.

    Args:
        ids: What was looked up.
        rows: What was found, in the dtype of the result.
        token_ids: Which ids have rows of their own, each once.
        tokens: These rows.

    Example:
        >>> ids, own = jnp.array([4, 7]), jnp.array([[1.0, 2.0]])
        >>> replace_rows(ids, jnp.zeros((2, 2)), jnp.array([7]), own).tolist()
        [[0.0, 0.0], [1.0, 2.0]]
    """
    order = jnp.argsort(token_ids)
    place = jnp.searchsorted(token_ids, ids, sorter=order)
    slot = order[jnp.minimum(place, len(token_ids) - 1)]
    own = jnp.take(tokens, slot, axis=0).astype(rows.dtype)
    return jnp.where((token_ids[slot] == ids)[..., None], own, rows)


def token_param(
    path: str, base: Any, leaves: Mapping[str, Any]
) -> tuple[TokenParam | None, tuple[str, ...]]:
    """A table with its own rows, if there are any in `leaves`, and the paths of these.

    Raises:
        InputError: if they do not fit the table, or it has an adapter as well.
    """
    names = token_names(path)
    if names[0] not in leaves:
        return None, ()
    if names[1] not in leaves:
        raise InputError(f"{path}: the adapter lacks {names[1]}")
    tokens, ids = (leaves[name] for name in names)
    vocabulary, width = _sizes(path, base)
    if tokens.shape[1:] != (width,) or ids.shape != tokens.shape[:1]:
        raise InputError(
            f"{path}: lora_tokens {tokens.shape} and lora_token_ids {ids.shape} do not fit the"
            f" base's {leaf_shape(base)[0]}; this adapter was made for another base"
        )
    check_alone(path, leaves)
    return TokenParam(base, tokens, ids, path), names


def check_alone(path: str, adapter: Collection[str]) -> None:
    """Refuse rows of a table that is adapted too: PEFT does, since neither would be the sum."""
    if adapter_names(path)[0] in adapter:
        raise InputError(
            f"lora: trainable_token_indices and target_modules both reach {path}; take it out of"
            " one of them"
        )


def token_tables(
    params: Params, config: LoraConfig, layouts: Layouts | None = None
) -> dict[str, list[int]]:
    """From the path of each table with trainable rows to their ids, in the config's order.

    A list is for the one embedding that there is; a mapping is for modules of these names, which
    may be heads.  A head that shares the embedding has no rows of its own.

    Args:
        params: The base's parameters, or their shapes.
        config: Its `trainable_token_indices`.
        layouts: Which parameters are stacked.

    Raises:
        InputError: if a name matches nothing, an id lies outside of the vocabulary, or a table is
            trained in full as well.

    Example:
        >>> params = {"wte": {"embedding": jnp.zeros((9, 4))}}
        >>> token_tables(params, LoraConfig(trainable_token_indices=[7, 2]))
        {'wte/embedding': [7, 2]}
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    shapes = {path: leaf for path, leaf in leaves_with_path(params) if _is_table(path, layouts)}
    if isinstance(wanted, list):
        known = embedding_of(params)
        tables = [known.table] if known else [path for path in shapes if is_embedding(path)]
        found = dict.fromkeys(tables, wanted)
        if len(found) != 1:
            raise InputError(
                "lora: trainable_token_indices: a list is for the one embedding of a model, and"
                f" this has {', '.join(found) or 'none'}; map module names to ids"
            )
    else:
        found = _by_name(_without_shared_head(params, wanted), shapes)
    for path, ids in found.items():
        vocabulary, _ = _sizes(path, shapes[path])
        if max(ids) >= vocabulary:
            raise InputError(
                f"lora: trainable_token_indices: {max(ids)} is no row of {path}, which has"
                f" {vocabulary}; give ids from 0 to {vocabulary - 1}"
            )
        module = path.rpartition("/")[0]
        if name := next((n for n in config.modules_to_save or [] if is_saved(module, n)), None):
            raise InputError(
                f"lora: trainable_token_indices: modules_to_save {name!r} trains {path} in full;"
                " take it out of one of them"
            )
    return found


def first_tokens(path: str, leaf: Any, ids: list[int], dtype: Any) -> dict[str, Array]:
    """The leaves of an adapter whose rows are still the base's."""
    where = jnp.asarray(ids)
    if isinstance(leaf, QuantizedTensor) and is_embedding(path) and leaf.contracting == (1,):
        rows = look_up(leaf, where, jnp.float32)
    else:
        dense = _dense(leaf)
        rows = dense[where] if is_embedding(path) else dense[:, where].T
    return token_leaves(path, rows.astype(dtype), ids)


def token_leaves(path: str, rows: Any, ids: list[int]) -> dict[str, Array]:
    """Rows and their ids as the leaves of an adapter."""
    names = token_names(path)
    return {names[0]: jnp.asarray(rows), names[1]: jnp.asarray(ids, jnp.float32)}


def _dense(leaf: Any) -> Array:
    if isinstance(leaf, QuantizedTensor):
        return dequantize(leaf, jnp.float32)
    return jnp.asarray(meta.unbox(leaf))


def _is_table(path: str, layouts: Layouts | None) -> bool:
    return path.rpartition("/")[2] in LAYER_PARAMS and rule_for(layouts, path).stack is None


def _sizes(path: str, leaf: Any) -> tuple[int, int]:
    """(vocabulary, d) of a table."""
    shape, _ = leaf_shape(leaf)
    if len(shape) != 2:
        raise InputError(
            f"lora: trainable_token_indices: {path} has shape {shape} and no rows of tokens; name"
            " an embedding or a linear head"
        )
    return (shape[0], shape[1]) if is_embedding(path) else (shape[1], shape[0])


def _without_shared_head(params: Params, wanted: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The mapping without a head that shares the embedding and has the same ids."""
    shared = shared_table(params)
    if shared is None or shared.head not in wanted:
        return dict(wanted)
    rest = {name: ids for name, ids in wanted.items() if name != shared.head}
    table = target_name(shared.table)
    if [ids for name, ids in rest.items() if is_within(table, name)] != [wanted[shared.head]]:
        name = shared.module.rpartition(".")[2]
        raise InputError(
            f"lora: trainable_token_indices: the output head of this base shares {shared.table};"
            f" give {shared.head} and {name} the same ids, or give the base as a checkpoint with"
            " tie_word_embeddings false"
        )
    return rest


def _by_name(wanted: Mapping[str, list[int]], tables: Mapping[str, Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, ids in wanted.items():
        paths = [path for path in tables if _is_named(target_name(path), name)]
        if not paths:
            modules = [target_name(path) for path in tables]
            last = {module.rpartition("/")[2] for module in modules}
            raise InputError(
                f"lora: trainable_token_indices {name!r} matches nothing{nearest(name, last)}."
                f" There is: {', '.join(sorted(last))}"
            )
        found |= dict.fromkeys(paths, ids)
    return found


def _is_named(module: str, name: str) -> bool:
    dotted, name = module.replace("/", "."), name.replace("/", ".")
    return dotted == name or dotted.endswith(f".{name}")
