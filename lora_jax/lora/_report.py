"""What a config adapts of a base and what it leaves out, counted and told."""

import dataclasses
import html
import math
from typing import Any

import jax

from .._config import LoraConfig
from .._tree import leaves_with_path, tree_bytes
from .._typing import Params
from ._init import fresh_adapter
from ._layout import Layouts, paths_of_layers, rule_for
from ._target import Target, target_name
from ._targets import (
    FACTORS,
    TRAINED,
    find_targets,
    is_target,
    leaf_shape,
    pattern_counts,
    trainable_mask,
)


@dataclasses.dataclass(frozen=True)
class TargetReport:
    """Which parameters a config adapts, which not, and how many numbers are trained.

    Printed it is a table; a notebook shows it as one.

    Args:
        patterns: (field, pattern, number of single modules it matches) of the config.
        targets: The adapted parameters.
        whole: Paths of what is trained in full, without factors, and how many numbers that is.
        left_out: Paths of what is not trained, their shapes, and why.
        trainable, frozen: Numbers (those in four bits counted unpacked).
        trainable_bytes, frozen_bytes: What they take in memory.
    """

    patterns: tuple[tuple[str, str, int], ...]
    targets: tuple[Target, ...]
    whole: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, tuple[int, ...], str], ...]
    trainable: int
    trainable_bytes: int
    frozen: int
    frozen_bytes: int

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, names of columns and rows of each table."""
        matched = [[field, pattern, f"{n:,}"] for field, pattern, n in self.patterns]
        adapted = [
            [t.path, _layers(t), _ranks(t), f"{t.d_in} -> {t.d_out}", f"{t.parameters:,}"]
            for t in self.targets
        ] + [[path, "", "in full", "", f"{size:,}"] for path, size in self.whole]
        left = [[path, " x ".join(map(str, shape)), why] for path, shape, why in self.left_out]
        share = self.trainable / max(self.trainable + self.frozen, 1)
        counts = [
            ["trainable", f"{self.trainable:,}", f"{self.trainable_bytes:,}", f"{share:.3%}"],
            ["frozen", f"{self.frozen:,}", f"{self.frozen_bytes:,}", f"{1 - share:.3%}"],
        ]
        return [
            ("patterns", ["field", "pattern", "matches"], matched),
            ("adapted", ["parameter", "layers", "rank", "maps", "trained"], adapted),
            ("left out", ["parameter", "shape", "why"], left),
            ("parameters", ["", "numbers", "bytes", "share"], counts),
        ]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as shown:
            console.print(self)
        return shown.get().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table

        for title, columns, rows in self.tables():
            table = Table(title=title, title_justify="left", box=None, pad_edge=False)
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if _is_number(rows, i) else "left")
            for row in rows:
                table.add_row(*row)
            if rows:
                yield table
                yield ""

    def _repr_html_(self) -> str:
        """The tables for a notebook."""
        parts = []
        for title, columns, rows in self.tables():
            head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            if rows:
                parts.append(
                    f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead>"
                    f"<tbody>{body}</tbody></table>"
                )
        return "".join(parts)


def target_report(
    params: Params, config: LoraConfig, *, layouts: Layouts | None = None
) -> TargetReport:
    """What `config` adapts of a base; nothing is computed.

    Args:
        params: The base's parameters: arrays, quantized tensors, or shapes.
        config: Names and patterns, ranks, what is trained in full.
        layouts: Axes of kernels that are not plain matrices, and of stacked layers.

    Raises:
        InputError: as `init_adapter` does: for a pattern that matches nothing, above all.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 6))}, "norm": {"scale": jnp.ones(4)}}
        >>> report = target_report(params, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> report.patterns, report.trainable, report.frozen
        ((('target_modules', 'q_proj', 1),), 20, 28)
        >>> print(report.left_out)
        (('norm/scale', (4,), 'one axis'),)
    """
    targets = find_targets(params, config, layouts=layouts)
    counts = pattern_counts(params, config, layouts=layouts)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    adapter = jax.eval_shape(lambda key, p: fresh_adapter(key, p, config, layouts), key, params)
    chosen = dict(leaves_with_path(trainable_mask(adapter, config)))
    trained = {path: x for path, x in leaves_with_path(adapter) if chosen[path]}
    # Of stacked layers, the padding to a common rank is no parameter.
    others = {path: x.size for path, x in trained.items() if not path.endswith(FACTORS)}
    whole = {path: size for path, size in others.items() if not path.endswith(TRAINED)}
    reached = {target.path for target in targets} | whole.keys()
    leaves = dict(leaves_with_path(params))
    return TargetReport(
        patterns=tuple((*which, count) for which, count in counts.items()),
        targets=targets,
        whole=tuple(whole.items()),
        left_out=tuple(
            (path, leaf_shape(leaf)[0], _why(path, leaf, config, layouts))
            for path, leaf in leaves.items()
            if path not in reached
        ),
        trainable=sum(target.parameters for target in targets) + sum(others.values()),
        trainable_bytes=tree_bytes(trained),
        frozen=sum(math.prod(leaf_shape(leaf)[0]) for leaf in leaves.values()),
        frozen_bytes=tree_bytes(params),
    )


def _why(path: str, leaf: Any, config: LoraConfig, layouts: Layouts | None) -> str:
    """Why a parameter is not adapted."""
    shape, layout = leaf_shape(leaf)[0], rule_for(layouts, path)
    if len(shape) - layout.leading_axes < 2:
        return "one axis"

    def is_adapted(**without: Any) -> bool:
        other = dataclasses.replace(config, **without)
        return any(
            is_target(n, path, other) for n in paths_of_layers(target_name(path), layout, shape)
        )

    if config.exclude_modules and is_adapted(exclude_modules=None):
        return "exclude_modules"
    if config.layers_to_transform and is_adapted(layers_to_transform=None, layers_pattern=None):
        return "layers_to_transform"
    if config.target_modules == "all-linear":
        return "no linear layer, or the output layer"
    return "no pattern matches"


def _layers(target: Target) -> str:
    """How many layers are adapted, of how many; experts are counted behind them."""
    adapted = sum(map(bool, target.ranks))
    layers = f"{adapted} of {len(target.ranks)}"
    return layers if target.experts is None else f"{layers}, {target.experts} experts"


def _ranks(target: Target) -> str:
    return "/".join(str(rank) for rank in sorted(set(target.ranks)) if rank)


def _is_number(rows: list[list[str]], column: int) -> bool:
    return all(row[column].replace(",", "").rstrip("%").replace(".", "").isdigit() for row in rows)
