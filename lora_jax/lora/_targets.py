"""Which parameters an adapter touches: PEFT's matching rules, and a strict report."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from .._config import LoraConfig, ends_with_pattern, layer_number
from .._errors import InputError, nearest
from .._tree import leaves_with_path, map_with_path
from .._typing import Params
from ..quant import QuantizedTensor
from ._biases import trained_biases
from ._layout import (
    KernelLayout,
    Layouts,
    contracting_axes,
    matrix_shape,
    paths_of_layers,
    rule_for,
)
from ._target import (
    Target,
    is_or_ends_with,
    is_parameter,
    is_saved,
    parameter_names,
    parts_of,
    pattern_name,
    target_name,
)
from ._tied import OUTPUT_HEADS, tied_config

FACTORS = ("lora_A", "lora_B")
TRAINED = (*FACTORS, "lora_B_bias", "lora_magnitude", "lora_tokens")
"""Parts of an adapter that are trained."""


def find_targets(
    params: Params, config: LoraConfig, *, layouts: Layouts | None = None
) -> tuple[Target, ...]:
    """The parameters that `config` adapts, in the tree's order.

    Args:
        params: The base's parameters, arrays or shapes (`jax.eval_shape`).
        config: Names and patterns; matched against single layers' dotted paths.
        layouts: Axes of kernels that are not plain matrices, and which number experts.

    Raises:
        InputError: if there are neither `target_modules` nor `target_parameters`, or if any name
            or pattern (of targets, exclusions, ranks, alphas, layers) matches nothing.

    Example:
        >>> params = {"q_proj": {"kernel": np.zeros((4, 6))}, "norm": {"scale": np.zeros(4)}}
        >>> [t.names for t in find_targets(params, LoraConfig(target_modules=["q_proj"]))]
        [('q_proj',)]
        >>> params = {"experts": {"up": np.zeros((3, 4, 6)), "down": np.zeros((3, 6, 4))}}
        >>> config = LoraConfig(target_parameters=["experts.up"])
        >>> layouts = {"experts": KernelLayout(contracting=(0,), experts=True)}
        >>> [(t.path, t.lead) for t in find_targets(params, config, layouts=layouts)]
        [('experts/up', (3,))]
    """
    if config.target_modules is None and not config.target_parameters:
        raise InputError(
            "lora: target_modules is missing; give names such as ['q_proj', 'v_proj'], a regular"
            f" expression, or 'all-linear'. There is: {_summary(params, layouts)}"
        )
    wanted = _Matcher(tied_config(params, config))
    targets = _matched(params, wanted, layouts)
    wanted.check(targets, params, layouts)
    return targets


def pattern_counts(
    params: Params, config: LoraConfig, *, layouts: Layouts | None = None
) -> dict[tuple[str, str], int]:
    """(field, pattern) to the number of single modules it matches, taken out again or not.

    Example:
        >>> params = {"q_proj": {"kernel": np.zeros((4, 6))}, "norm": {"scale": np.zeros(4)}}
        >>> pattern_counts(params, LoraConfig(target_modules=["q_proj"]))
        {('target_modules', 'q_proj'): 1}
    """
    wanted = _Matcher(tied_config(params, config))
    _matched(params, wanted, layouts)
    return wanted.counts


def matched_targets(
    params: Params, config: LoraConfig, *, layouts: Layouts | None = None
) -> tuple[Target, ...]:
    """As `find_targets`, but a name or pattern that matches nothing is no error.

    For adapters that exist: there the tensors in the file show what is missing.
    """
    return _matched(params, _Matcher(tied_config(params, config)), layouts)


def _matched(params: Params, wanted: "_Matcher", layouts: Layouts | None) -> tuple[Target, ...]:
    targets = []
    for path, leaf in _candidates(params, layouts):
        layout = rule_for(layouts, path)
        names = paths_of_layers(target_name(path), layout, leaf_shape(leaf)[0])
        chosen = [wanted(name, path) for name in names]
        all_linear = wanted.config.target_modules == "all-linear"
        linear = layout.contracting != () and layout.window is None
        if any(chosen) and (linear or not all_linear):
            layout = dataclasses.replace(layout, contracting=known_contracting(layouts, path, leaf))
            targets.append(_target(path, leaf, names, chosen, wanted.config, layout))
    return tuple(targets)


def saved_modules(params: Params, config: LoraConfig) -> tuple[str, ...]:
    """Paths of the parameters below `modules_to_save`: trained in full, saved whole.

    Raises:
        InputError: if a name matches nothing.
    """
    wanted = tied_config(params, config).modules_to_save or []
    found: dict[str, list[str]] = {name: [] for name in wanted}
    for path, _ in leaves_with_path(params):
        module = path.rpartition("/")[0]
        for name in wanted:
            if is_saved(module, name):
                found[name].append(path)
    for name, paths in found.items():
        if not paths:
            raise InputError(
                f"lora: modules_to_save {name!r} matches nothing. There is: {_summary(params)}"
            )
    return tuple(dict.fromkeys(path for paths in found.values() for path in paths))


def is_target(name: str, param_path: str, config: LoraConfig) -> bool:
    """Whether `config` adapts the single module `name`, a layer of this parameter."""
    return _Matcher(config)(name, param_path)


def trainable_mask(params: Params, config: LoraConfig | None = None) -> Params:
    """True for every trainable leaf: `TRAINED` ones, and those that the config trains whole.

    Args:
        params: An adapter, or a base combined with one.
        config: Needed only when it names `modules_to_save` or a `bias`.

    Example:
        >>> trainable_mask({"q": {"kernel": 1, "lora_A": 2, "lora_B": 3, "lora_scaling": 4}})
        {'q': {'kernel': False, 'lora_A': True, 'lora_B': True, 'lora_scaling': False}}
    """
    saved = set(saved_modules(params, config)) if config and config.modules_to_save else set()
    if config and config.bias != "none":
        paths = [path for path, _ in leaves_with_path(params)]
        factors = [path for path in paths if path.rpartition("/")[2] == "lora_A"]
        kernels = [path.removesuffix("lora_A") + "kernel" for path in factors]
        saved |= set(trained_biases(paths, config.bias, kernels))
    return map_with_path(lambda path, _: path in saved or path.endswith(TRAINED), params)


def adapter_names(param_path: str) -> tuple[str, str, str]:
    """Paths of `lora_A`, `lora_B` and `lora_scaling` beside a parameter.

    Any parameter `w` but a kernel has its own, `w_lora_A`: a module may hold several, and an
    adapter shows by its names that it is an embedding's.
    """
    module, _, param = param_path.rpartition("/")
    prefix = f"{module}/" if module else ""
    prefix += "" if param == "kernel" else f"{param}_"
    return f"{prefix}lora_A", f"{prefix}lora_B", f"{prefix}lora_scaling"


def magnitude_name(param_path: str) -> str:
    """Path of `lora_magnitude` (DoRA) beside a parameter."""
    return adapter_names(param_path)[0].removesuffix("lora_A") + "lora_magnitude"


def bias_name(param_path: str) -> str:
    """Path of `lora_B_bias` (`lora_bias`) beside a parameter."""
    return adapter_names(param_path)[1] + "_bias"


def token_names(param_path: str) -> tuple[str, str]:
    """Paths of `lora_tokens` and `lora_token_ids` beside a table: rows of its own, and which."""
    prefix = adapter_names(param_path)[0].removesuffix("lora_A")
    return f"{prefix}lora_tokens", f"{prefix}lora_token_ids"


def is_embedding(param_path: str) -> bool:
    """Whether the parameter is a table that is looked up."""
    return param_path.rpartition("/")[2] == "embedding"


def known_contracting(layouts: Layouts | None, path: str, leaf: Any) -> tuple[int, ...] | None:
    """The contracted axes as ruled, or as a quantized tensor says itself.

    An embedding's adapter begins with its words, along whichever axis its blocks run.
    """
    ruled = rule_for(layouts, path).contracting
    if ruled is None and isinstance(leaf, QuantizedTensor):
        return (0,) if is_embedding(path) else leaf.contracting
    return ruled


class _Matcher:
    """PEFT's rules, counting what each pattern matched."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        layers = config.layers_to_transform
        self.layers = [layers] if isinstance(layers, int) else layers or None
        self.counts: dict[tuple[str, str], int] = {
            (field, pattern): 0
            for field in ("target_modules", "target_parameters", "exclude_modules")
            for pattern in _as_list(getattr(config, field))
        }
        self.counts |= {("layers_to_transform", str(layer)): 0 for layer in self.layers or []}
        lists = _as_list(config.layers_pattern) if self.layers else []
        self.counts |= {("layers_pattern", pattern): 0 for pattern in lists}

    def __call__(self, name: str, path: str) -> bool:
        """Whether to adapt the module `name`, a single layer of the parameter at `path`."""
        dotted = name.replace("/", ".")
        # Both are asked in any case: what is counted is what matches, not what is adapted.
        targeted = self._matches("target_modules", dotted)
        excluded = self._matches("exclude_modules", dotted)
        for entry in self.config.target_parameters or []:
            hits = [is_or_ends_with(n, entry) for n in parameter_names(name, path)]
            self.counts["target_parameters", entry] += any(hits)
        if any(is_saved(dotted, saved) for saved in self.config.modules_to_save or []):
            return False
        if is_parameter(name, path, self.config):  # PEFT's filters are for modules alone
            return True
        if not targeted or excluded:
            return False
        if self.config.target_modules == "all-linear" and not _is_linear(path):
            return False
        if self.layers is None:
            return True
        number = self._layer_number(dotted)
        if number in self.layers:
            self.counts["layers_to_transform", str(number)] += 1
        # A name in full says its layer itself.
        in_full = [p.replace("/", ".") for p in _as_list(self.config.target_modules)]
        return number in self.layers or dotted in in_full

    def _layer_number(self, dotted: str) -> int | None:
        """Which of a list's modules this is, or is in: PEFT's rule."""
        patterns = _as_list(self.config.layers_pattern)
        if not patterns:
            # The first number, and only below two names: a later one may count experts.
            found = re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", dotted)
            return int(found["number"]) if found else None
        for pattern in patterns:
            if found := re.match(layer_number(pattern), dotted):
                # Of "a|b" one side has no number, and matches nothing in PEFT either.
                number = found["number"]
                self.counts["layers_pattern", pattern] += number is not None
                return None if number is None else int(number)
        return None

    def _matches(self, field: str, dotted: str) -> bool:
        patterns = getattr(self.config, field)
        hits = [p for p in _as_list(patterns) if _hit(p, dotted, isinstance(patterns, str))]
        for pattern in hits:
            self.counts[field, pattern] += 1
        return bool(hits)

    def check(self, targets: tuple[Target, ...], params: Params, layouts: Layouts | None) -> None:
        """Refuse whatever matched nothing."""
        adapted = [
            pattern_name(n, t.path, self.config)
            for t in targets
            for n, rank in zip(t.names, t.ranks, strict=True)
            if rank
        ]
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.config, field):
                hits = [ends_with_pattern(pattern, name) for name in adapted]
                self.counts[field, pattern] = sum(map(bool, hits))
        names = [target_name(path) for path, _ in _candidates(params, layouts)]
        there = f"There is: {_summary(params, layouts)}"
        for (field, pattern), count in self.counts.items():
            filters = ("target_modules", "target_parameters", "exclude_modules")
            if not count and (adapted or field in filters):
                like = pattern if field == "target_parameters" else ""
                parts = {part for name in names for part in parts_of(name, like)}
                hint = nearest(pattern, parts)
                if pattern in parts:
                    hint = _whole(pattern, names, isinstance(getattr(self.config, field), str))
                raise InputError(f"lora: {field} {pattern!r} matches nothing{hint}. {there}")
        if not adapted:
            outermost = "; a list that lies below no other module needs layers_pattern"
            raise InputError(
                "lora: no module is left to adapt after exclude_modules, modules_to_save and"
                f" layers_to_transform{outermost if self.layers else ''}. {there}"
            )


def _whole(name: str, paths: list[str], is_expression: bool) -> str:
    """What was meant by a name that stands in paths and is none."""
    if is_expression:
        meaning = "means every module of that name"
        return f" whole: a string is one regular expression for paths; [{name}] {meaning}"
    inside = [f"/{path}".split(f"/{name}/", 1) for path in paths]
    below = {f"{name}.{parts[1].replace('/', '.')}" for parts in inside if len(parts) == 2}
    some = ", ".join(sorted(below)[:5])
    return f" itself: it is a module, and what lies in it has names of its own, such as {some}"


def _as_list(patterns: list[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns or []


def _hit(pattern: str, dotted: str, is_expression: bool) -> bool:
    if not is_expression:
        return is_or_ends_with(dotted, pattern)
    return pattern == "all-linear" or bool(re.fullmatch(pattern, dotted))


def _is_linear(path: str) -> bool:
    *modules, param = path.split("/")
    return param == "kernel" and not (modules and modules[-1] in OUTPUT_HEADS)


def _candidates(params: Params, layouts: Layouts | None) -> Iterator[tuple[str, Any]]:
    """The parameters that could be adapted: matrices and larger, a stack's axis not counted."""
    for path, leaf in leaves_with_path(params):
        shape, dtype = leaf_shape(leaf)
        axes = len(shape) - rule_for(layouts, path).leading_axes
        if axes >= 2 and jax.numpy.issubdtype(dtype, np.floating):
            yield path, leaf


def leaf_shape(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf, also of one in a Flax box such as `nn.Partitioned`."""
    array: Any = leaf if hasattr(leaf, "shape") else jax.eval_shape(meta.unbox, leaf)
    return tuple(array.shape), array.dtype


def _target(
    path: str,
    leaf: Any,
    names: list[str],
    chosen: list[bool],
    config: LoraConfig,
    layout: KernelLayout,
) -> Target:
    shape, _ = leaf_shape(leaf)
    kernel_shape = shape[layout.leading_axes :]
    ruled = layout.contracting
    if isinstance(leaf, QuantizedTensor) and leaf.kernel_shape != kernel_shape:
        ruled = None  # it knows its own axes, but not those in front of them
    contracting = contracting_axes(ruled, path, len(kernel_shape))
    if len(kernel_shape) > 2 and is_parameter(names[0], path, config):
        raise InputError(
            f"lora: target_parameters takes matrices and stacks of experts, not {path}"
            f" {shape}; name it in target_modules, or say that it has experts:"
            f' {{"{path}": KernelLayout(contracting=(0,), experts=True)}}'
        )
    window = tuple(kernel_shape[axis] for axis in contracting[:-1])
    if layout.window not in (None, window):
        raise InputError(
            f"{path}: its layout has the window {layout.window}, but the kernel {kernel_shape} has"
            f" {window}; take layouts from lora_linen(module).layouts(params, *inputs)"
        )
    d_in, d_out = matrix_shape(kernel_shape, contracting)
    own = [pattern_name(name, path, config) for name in names]
    return Target(
        path=path,
        names=tuple(names),
        ranks=tuple(config.rank(n) if use else 0 for n, use in zip(own, chosen, strict=True)),
        scalings=tuple(
            config.scaling(n) if use else 0.0 for n, use in zip(own, chosen, strict=True)
        ),
        d_in=d_in,
        d_out=d_out,
        layout=layout,
        experts=shape[layout.leading_axes - 1] if layout.experts else None,
    )


def _summary(params: Params, layouts: Layouts | None = None) -> str:
    """The last names of all candidates, each once."""
    names: Mapping[str, None] = {
        target_name(p).split("/")[-1]: None for p, _ in _candidates(params, layouts)
    }
    return ", ".join(names) or "no parameter with two axes or more"
