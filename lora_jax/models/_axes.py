"""What the axes of a decoder's parameters are called, so that one table can say how to cut them."""

from ._families import Family

AXES = {
    "layers": "layers of a stack",
    "embed": "the model's width, in kernels of the blocks",
    "heads": "columns of all query heads, or rows that take them in",
    "kv_heads": "columns of all heads of keys or values",
    "mlp": "the MLP's inner width",
    "vocab": "the vocabulary, in the embedding and the head",
    "table_embed": "the model's width, in the embedding and the head",
    "adapter_embed": "the model's width, in adapters",
    "rank": "an adapter's rank",
    "whole": "what is never cut",
}
"""Names of axes, and what they are."""
WHOLE = "whole"


def logical_axes(path: str, family: Family, ndim: int) -> tuple[str, ...]:
    """The names of the axes of a parameter, dense, or of an adapter's leaf.

    Where one kernel makes queries, keys and values, or gate and up, its columns are `whole`: what
    belongs to one device would not lie together.

    Args:
        path: The parameter's.
        family: Whose tree it is.
        ndim: How many axes it has, that of the layers included.

    Example:
        >>> from lora_jax.models._families import FAMILIES
        >>> logical_axes("model/layers/self_attn/o_proj/kernel", FAMILIES["llama"], 3)
        ('layers', 'heads', 'embed')
        >>> logical_axes("model/layers/self_attn/o_proj/lora_B", FAMILIES["llama"], 3)
        ('layers', 'rank', 'adapter_embed')
    """
    *above, leaf = path.split("/")
    module = "/".join(above)
    if module == f"{family.body}/{family.embedding}":
        return _names(leaf.removeprefix("embedding_"), "vocab", "table_embed", ndim)
    if module == family.head:
        return _names(leaf, "table_embed", "vocab", ndim)
    if not module.startswith(f"{family.stack}/"):
        return (WHOLE,) * ndim
    d_in, d_out = _kernel_axes(above[-2], above[-1], family)
    return "layers", *_names(leaf, d_in, d_out, ndim - 1)


def _names(leaf: str, d_in: str, d_out: str, ndim: int) -> tuple[str, ...]:
    """The axes of what stands beside a kernel, or is it."""
    ours = {"embed": "adapter_embed", "table_embed": "adapter_embed"}
    thin_in, thin_out = ours.get(d_in, d_in), ours.get(d_out, d_out)
    return {
        "kernel": (d_in, d_out),
        "embedding": (d_in, d_out),
        "bias": (thin_out,),
        "lora_A": (thin_in, "rank"),
        "lora_B": ("rank", thin_out),
        "lora_B_bias": (thin_out,),
        "lora_magnitude": (thin_out,),
    }.get(leaf, (WHOLE,) * ndim)


def _kernel_axes(parent: str, module: str, family: Family) -> tuple[str, str]:
    if parent == family.attention and module == family.out:
        return "heads", "embed"
    if parent == family.attention and module in family.qkv:
        if len(family.qkv) == 1:
            return "embed", "heads" if family.qkv_by_head else WHOLE
        return "embed", "heads" if module == family.qkv[0] else "kv_heads"
    if parent == family.mlp and module == family.down:
        return "mlp", "embed"
    if parent == family.mlp and module in family.up:
        return "embed", WHOLE if family.gated and len(family.up) == 1 else "mlp"
    return WHOLE, WHOLE
