"""Plans as text for a terminal, and as pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ._plan import OWNERS, Plan
from ._targets import ROOM

_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
# JAX's allocator takes this share of a GPU's memory unless it is told otherwise.
_BY_DEFAULT = 0.75
_LITTLE = 1000
"""Bytes of exchanges that no line tells of: flags and sums."""


def show(plan: Plan) -> str:
    """A plan in words, with a bar for every owner of memory and what a step takes at least."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    yield from _head(plan)
    yield ""
    for name, size in plan.owners.items():
        yield f"  {name:12} {size / 1e9:8.3f} GB  {_bar(size / plan.limit)}".rstrip()
    yield f"  {'sum':12} {plan.total / 1e9:8.3f} GB  {_verdict(plan)}"
    if plan.host:
        yield f"  {'on the host':12} {plan.host / 1e9:8.3f} GB"
    yield ""
    if plan.refused is not None:
        return
    yield f"  a step: {_amounts(plan)}"
    yield f"  {_bound(plan)}"
    if plan.target.platform == "cuda":
        yield "  (attention and four bits by XLA; a run tries cuDNN and kernels of its own, too)"
        if plan.run["offload_optimizer"]:
            yield "  (offload_optimizer is not planned for GPUs: the state counts as if it stayed)"
    if plan.target.platform == "cuda" and plan.fits and plan.total > _share(plan):
        yield "  JAX takes 75 % of a GPU unless told: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


def _head(plan: Plan) -> Iterator[str]:
    run, model, target = plan.run, plan.model, plan.target
    quant = "dense" if run["quant"] is None else run["quant"]["format"]
    rank = "" if run["method"] == "full" else f" (rank {run['rank']})"
    yield (
        f"{model['path']}: {model['parameters'] / 1e9:.3f} G parameters, {quant};"
        f" {model['trainable'] / 1e6:.3f} M trained{rank}"
    )
    times = f"{run['accumulate']} × " if run["accumulate"] > 1 else ""
    yield (
        f"{times}{run['batch_size']} × {run['max_length']} tokens a step, {run['dtype']}, remat"
        f" {run['remat']}, {run['optimizer']}"
    )
    axes = ", ".join(f"{axis} {n}" for axis, n in run["mesh"].items() if n > 1)
    several = f", each of {target.count} ({axes})" if target.count > 1 else ""
    yield f"for {target.device.name}{several}; compiled by jax {plan.versions['jax']}, not run"
    if run["idle"]:
        yield run["idle"]


def _bar(share: float) -> str:
    eighths = round(min(share, 1) * _WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _verdict(plan: Plan) -> str:
    over, limit = plan.total - plan.limit, plan.limit / 1e9
    if not plan.compiled:
        return f"and temporaries, of {limit:.1f}: does not fit (not compiled)"
    if plan.fits:
        return f"of {limit:.1f}: fits, {-over / 1e9:.1f} GB ({-over / plan.limit:.0%}) free"
    if over > 0:
        return f"of {limit:.1f}: does not fit, {over / 1e9:.1f} GB too much"
    return f"of {limit:.1f}: does not fit, the compiler refuses it"


def _amounts(plan: Plan) -> str:
    flops = sum(plan.flops.values())
    moved = f"at least {_scaled(plan.traffic or 0)}B to and from memory"
    between = [
        f"{x['count']} {x['kind']} of {_scaled(x['bytes'])}B {x['dtype']} in all"
        for x in plan.collectives
        if x["bytes"] >= _LITTLE
    ]
    return ", ".join([f"{flops:.3g} FLOPs", moved, *(between or ["nothing between devices"])])


def _scaled(amount: float) -> str:
    """Three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if amount < 1000 or prefix == "P":
            break
        amount /= 1000
    return f"{amount:.3g} {prefix}"


def _bound(plan: Plan) -> str:
    if not plan.bounds:
        return "bound: none, since no data sheet tells how fast this machine is"
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.bounds.items())
    return (
        f"bound: at least {max(plan.bounds.values()):.3g} s a step that trains on all its tokens"
        f" ({parts}); a roofline, no prediction"
    )


def _share(plan: Plan) -> float:
    return plan.limit / ROOM * _BY_DEFAULT


def show_found(found: tuple[Sequence[str], Plan] | None) -> str:
    """What a search for a change that fits has found, as words to copy and a plan."""
    if found is None:
        return "no change known here makes it fit; take a smaller model or a larger machine"
    return f"it fits with {' '.join(found[0])}\n\n{show(found[1])}"


def show_grid(plans: Sequence[Plan]) -> str:
    """Plans of several batches and lengths as a grid of gigabytes; `!` marks what does not fit."""
    batches, lengths, cells = _grid(plans)
    lines = ["GB by rows in a batch (down) and tokens in a row (across); ! does not fit"]
    lines.append("".join([" " * 6, *(f"{length:>10}" for length in lengths)]))
    for batch in batches:
        row = [cells.get((batch, length)) for length in lengths]
        words = ["" if p is None else f"{p.total / 1e9:.2f}{' ' if p.fits else '!'}" for p in row]
        lines.append("".join([f"{batch:>6}", *(f"{word:>10}" for word in words)]))
    return "\n".join(lines)


def _grid(plans: Sequence[Plan]) -> tuple[list[int], list[int], dict[tuple[int, int], Plan]]:
    cells = {(p.run["batch_size"], p.run["max_length"]): p for p in plans}
    return sorted({b for b, _ in cells}), sorted({s for _, s in cells}), cells


def draw(plans: Sequence[Plan], path: str | Path) -> None:
    """Draw one plan as a bar, or several as memory against tokens, into a PNG file.

    Raises:
        InputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    from .._drawing import save_figure

    figure = Figure(figsize=(8, 2.8 if len(plans) == 1 else 4.5), layout="constrained")
    axes = figure.subplots()
    (_draw_bar if len(plans) == 1 else _draw_sweep)(axes, plans)
    save_figure(figure, [axes], path)


def _draw_bar(axes, plans: Sequence[Plan]) -> None:
    from .._drawing import COLOURS

    (plan,) = plans
    left = 0.0
    for name, colour in zip(OWNERS, COLOURS, strict=True):
        size = plan.owners[name] / 1e9
        if size >= 0.005:
            axes.barh(0, size, left=left, color=colour, label=f"{name} {size:.2f}")
        left += size
    axes.axvline(plan.limit / 1e9, color="black", linestyle="--")
    label = f"GB on the device (dashed: {plan.limit / 1e9:.1f})"
    # The end of a long path is what tells.
    lines = [line if len(line) < 90 else f"…{line[-88:]}" for line in _head(plan)]
    axes.set(xlabel=label, yticks=[], title="\n".join(lines))
    axes.title.set_fontsize(9)
    axes.figure.legend(frameon=False, ncols=4, fontsize=8, loc="outside lower center")


def _draw_sweep(axes, plans: Sequence[Plan]) -> None:
    from .._drawing import COLOURS

    batches, lengths, cells = _grid(plans)
    for length, colour in zip(lengths, COLOURS * len(lengths), strict=False):
        line = [(b, cells[b, length].total / 1e9) for b in batches if (b, length) in cells]
        axes.plot(*zip(*line, strict=True), marker="o", color=colour, label=f"{length} tokens")
    axes.axhline(plans[0].limit / 1e9, color="black", linestyle="--", label="the device")
    axes.set(xlabel="rows in a batch", ylabel="GB on the device", ylim=(0, None))
    axes.set_xticks(batches)
    axes.set_title(list(_head(plans[0]))[-1], fontsize=9)
    axes.legend(frameon=False)
