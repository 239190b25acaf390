"""Where a parameter lives in a Hugging Face file: the one mapping of names."""

from collections.abc import Sequence

from ._tree import is_below, layer_paths

# Leaf names that differ; most linear kernels are also the transpose of their `weight`.
_HF_LEAF = {"kernel": "weight", "embedding": "weight"}
_CONV1D = ("c_attn", "c_fc", "c_proj")
"""GPT-2's linear layers, whose `weight` is (d_in, d_out)."""


def hf_keys(path: str, stacked: Sequence[str], layers: int) -> list[str]:
    """The tensors behind one leaf of the tree: one, or one for each stacked layer.

    Args:
        path: The leaf's path in the tree.
        stacked: Paths whose leaves carry a leading layer axis.
        layers: The number of layers in a stack.

    Example:
        >>> hf_keys("model/layers/self_attn/q_proj/kernel", ["model/layers"], 2)
        ['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
        >>> hf_keys("model/embed_tokens/embedding", ["model/layers"], 2)
        ['model.embed_tokens.weight']
    """
    module, _, leaf = path.rpartition("/")
    name = _HF_LEAF.get(leaf, leaf)
    modules = layer_paths(module, stack_of(path, stacked), layers)
    return [f"{m}/{name}".replace("/", ".") for m in modules]


def stack_of(path: str, stacked: Sequence[str]) -> str | None:
    """The stack a leaf belongs to, if any."""
    return next((stack for stack in stacked if path != stack and is_below(path, stack)), None)


def is_kernel(path: str) -> bool:
    """Whether the leaf is a linear kernel."""
    return path.rpartition("/")[2] == "kernel"


def is_transposed(path: str) -> bool:
    """Whether files hold a leaf as its transpose: a linear kernel, but of GPT-2's `Conv1D`.

    Example:
        >>> [is_transposed(f"{name}/kernel") for name in ("self_attn/q_proj", "attn/c_attn")]
        [True, False]
    """
    return is_kernel(path) and path.split("/")[-2:-1] not in [[name] for name in _CONV1D]
