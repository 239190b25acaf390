"""Smaller runs: the least change to a config that a machine holds, and memory over a grid."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .._errors import InputError
from ._plan import Plan, plan

Words = tuple[str, ...]
"""`--section.key value` words."""

LEAST_LENGTH, LEAST_CHUNK = 512, 128
_AXES = {"batch": "--train.batch_size", "seq": "--data.max_length"}


def search(
    config: Any,
    target: str,
    overrides: Sequence[str],
    start: Plan,
    tell: Callable[[Plan, Words], None] = lambda plan, words: None,
) -> tuple[Words, Plan] | None:
    """The least change after which a run fits, or None if all of them together do not help.

    One change is less than several, and of single ones the earlier in `changes`. Several are
    minimal: without any one of them the run would not fit.

    Args:
        config, target, overrides: As for `plan`.
        start: The plan that does not fit.
        tell: Called with every change that is tried and the plan it gives.

    Returns:
        The words to add to the overrides, and their plan.
    """

    def attempt(words: Words) -> Plan | None:
        try:
            made = plan(config, target, [*overrides, *words], at_most=start.limit)
        except InputError:  # a change that this run cannot have
            return None
        tell(made, words)
        return made

    steps = list(changes(start))
    for words in steps:
        made = attempt(words)
        if made is not None and made.fits:
            return words, made
    taken: list[Words] = []
    least = start
    for words in steps:
        more = [x for x in taken if x[0] != words[0]] + [words]
        made = attempt(sum(more, ()))
        if made is not None and made.fits:
            return _without_idle(more, made, attempt)
        # What does not help beside the others is left out again.
        if made is not None and made.total < least.total:
            taken, least = more, made
    return None


def _without_idle(
    taken: list[Words], made: Plan, attempt: Callable[[Words], Plan | None]
) -> tuple[Words, Plan]:
    """Leave out, one after another, the changes that are not needed."""
    for words in taken[:-1]:
        rest = [x for x in taken if x != words]
        fewer = attempt(sum(rest, ())) if rest else None
        if fewer is not None and fewer.fits:
            taken, made = rest, fewer
    return sum(taken, ()), made


def changes(start: Plan) -> Iterator[Words]:
    """Changes that save memory, those that harm least first.

    Results stay the same under the first four (weights cut over devices, a chunk of the loss, what
    is computed twice, rows summed up in turns), then come fewer bits, the host's memory, and
    shorter rows.
    """
    run = start.run
    copies = run["mesh"].get("data", 1)
    if copies > 1:
        yield "--mesh.fsdp", str(copies * run["mesh"]["fsdp"])
    if run["loss_chunk"] > LEAST_CHUNK:
        yield "--train.loss_chunk", str(LEAST_CHUNK)
    if run["remat"] != "nothing" and run["remat"] != "offload":
        yield "--model.remat", "nothing"
    batch, accumulate = run["batch_size"], run["accumulate"]
    while batch % 2 == 0:
        batch, accumulate = batch // 2, accumulate * 2
        yield "--train.batch_size", str(batch), "--train.accumulate", str(accumulate)
    if run["optimizer"] == "adamw":
        yield "--train.optimizer", "adamw_8bit"
    if run["dtype"] == "float32":
        yield "--model.dtype", "bfloat16"
    if run["param_dtype"] == "float32" and run["method"] == "lora":
        yield "--model.param_dtype", "bfloat16"
    if run["method"] == "lora":
        yield from _fewer_bits(run["quant"])
    # The memory of a CPU is the host's, and that of a GPU that is not here cannot be told from it.
    if start.target.platform != "cpu" and run["remat"] != "offload":
        yield "--model.remat", "offload"
    if start.target.platform == "tpu" and not run["offload_optimizer"]:
        yield "--train.offload_optimizer", "true"
    length = run["max_length"]
    while length // 2 >= LEAST_LENGTH:
        length //= 2
        yield "--data.max_length", str(length)


def _fewer_bits(quant: dict[str, Any] | None) -> Iterator[Words]:
    """The kernels in four bits, then the embedding and the head in eight and in four."""
    if quant is not None and quant["stored"]:
        return
    kernels = ("--quant.format", "nf4") if quant is None or quant["format"] == "int8" else ()
    if kernels:
        yield kernels
    head = None if quant is None else quant["head"]
    for format in {None: ("int8", "nf4"), "int8": ("nf4",)}.get(head, ()):
        yield *kernels, "--quant.embedding", format, "--quant.head", format


def sweep(
    config: Any,
    target: str,
    overrides: Sequence[str],
    axes: str,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Plans for every pair of values of two axes, `batch` (rows) and `seq` (tokens in a row).

    A pair that the model or the compiler cannot have is left out.

    Args:
        config, target, overrides: As for `plan`.
        axes: `batch,seq`, one of them, or with values of one's own `batch=1:2:4,seq=512:1024`.
        tell: Called with every plan.

    Raises:
        InputError: for another axis, a value that is no whole number above 0, or if no pair can
            be planned.
    """
    plans, failed = [], None
    for values in itertools.product(*_values(axes)):
        words = [word for pair in values for word in pair]
        try:
            plans.append(plan(config, target, [*overrides, *words]))
        except InputError as error:
            failed = failed or error
            continue
        tell(plans[-1])
    if failed is not None and not plans:
        raise failed
    return plans


def _values(axes: str) -> list[list[Words]]:
    """For every axis that is named, the words of each of its values."""
    usual = {"batch": "1:2:4:8", "seq": "512:1024:2048:4096"}
    found = {}
    for part in axes.split(","):
        name, given, numbers = part.partition("=")
        numbers = numbers if given else usual.get(name, "")
        if name not in _AXES or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)*", numbers):
            raise InputError(
                f"--sweep: {part!r} is no axis; give batch,seq or values of your own, as in"
                " batch=1:2:4,seq=512:1024"
            )
        found[name] = sorted({int(number) for number in numbers.split(":")})
    return [[(_AXES[name], str(value)) for value in values] for name, values in found.items()]
