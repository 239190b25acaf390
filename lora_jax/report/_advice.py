"""What a run's numbers suggest to change: each line with the number seen and the setting."""

import statistics
from collections.abc import Callable

from ._blocks import percent
from ._run import Run
from ._spectra import needed_rank

TURNED = 0.01
"""Held-out loss above its lowest that counts as overfitting: the rows of two looks are the same, so
what is left of chance is far below a hundredth."""
UNCHANGED = 1e-3
"""Change of the held-out loss that nobody would notice: 0.3 % of perplexity at a loss of 3."""
NO_DELTA = 1e-4
"""Norm of a delta over its kernel's below which it does nothing: bfloat16 resolves 4e-3."""
SPIKE = 0.5
"""Training loss above the median of those around it. Means over `log_every` steps of usual batches
differ by a tenth or two."""
SCATTER = 8.0
"""The same over how far records usually lie from those around: of records of single steps far."""
RARE = 0.03
"""Of the records: a few jumps in a long run come of strange rows, and are made good."""
AROUND = 3
"""Records before and after one that it is compared with."""
STEEP_NORM = 9.0
"""Gradient norm above the median of those around it: ten of them, where usual batches differ by a
factor of two or three."""
CLIPPED = 5.0
"""Median gradient norm over `clip_norm`: around 1 clipping is usual. Far above, nearly all are cut
to one length, so that a steep gradient counts like the others. The length of the steps is hardly
touched: Adam divides by its own mean."""
DIVERGED = 0.1
"""Training loss of the last quarter above the lowest of as many steps."""
GIVEN_BACK = 0.2
"""The same as a share of the fall before: near the end of a long fall, a tenth is noise."""
CERTAIN = 9.0
"""Times the scatter of a mean of records that two means must differ by. The lowest of many means is
one of the two, and the scatter itself comes of a few records: with 3 one flat line in five of a
dozen records would be said to rise, with 9 one in seventy."""
STILL_FALLING = 0.15
"""Share of the whole fall that comes in the last quarter: a quarter on a straight line, near
nothing on one that has flattened."""
NOTABLE = 0.03
"""Of the loss: a fall in the last quarter that would be worth more steps."""
UNUSED_RANK = 4
"""Times the rank is larger than what keeps 99 %: half would be a matter of taste."""
FIRST_STEPS = 30
"""Steps before which a delta, which begins at zero, has had no time to take more directions."""
MOSTLY_PADDING = 0.4
"""Of a batch. Packed rows leave a few per cent, so beyond this time is given away."""
MOSTLY_MASKED = 0.95
"""Of the tokens. Short answers to long prompts are usual, one trained token in twenty is not."""
LOST_ROWS = 0.02
"""Of the rows, truncated or dropped: a few long ones among thousands do not matter."""
ENOUGH = 8
"""Records below which a line has no shape to judge."""


def advice(run: Run) -> list[str]:
    """What stands out in a run, a line each; nothing of a healthy one.

    Args:
        run: From `read_run`.
    """
    return [line for rule in _RULES for line in [rule(run)] if line is not None]


def _overfitting(run: Run) -> str | None:
    """The held-out loss has turned up while the training loss fell, and the best is not kept."""
    best, looks = run.best, run.looks
    if best is None or run.keeps_best or _worse(run) or not _learned(run):
        return None
    rise = looks[-1]["eval_loss"] - best["eval_loss"]
    if rise <= TURNED * best["eval_loss"]:
        return None
    less = " lora.lora_dropout: 0.05, a smaller lora.r," if _is_lora(run) else ""
    many = run.config["train"].get("eval_every")
    looking = "train.patience: 3" if many else "train.eval_every and train.patience: 3"
    return (
        f"overfitting: the held-out loss rose from {best['eval_loss']:.3f} at step {best['step']}"
        f" to {looks[-1]['eval_loss']:.3f} at step {looks[-1]['step']} (+{rise:.3f}); set"
        f" {looking},{less} or train.steps: {best['step']}"
    )


def _worse(run: Run) -> str | None:
    """The held-out loss never was below that before training, and rose."""
    kept, best, looks = run.kept, run.best, run.looks
    if kept is None or best is None or looks[0]["step"]:
        return None
    before, after = looks[0]["eval_loss"], kept["eval_loss"]
    if best["eval_loss"] < before or after - before <= TURNED * before:
        return None
    rate = run.config["train"]["learning_rate"]
    return (
        f"worse than before: the held-out loss rose from {before:.3f} before training to"
        f" {after:.3f} at step {kept['step']} (+{after - before:.3f}), and never was lower; set"
        f" train.learning_rate: {_round(rate / 3)} (now {rate:g}), or check that held-out rows and"
        " training rows are of the same kind"
    )


def _learned(run: Run) -> bool:
    """Whether the training loss fell over the run."""
    losses = run.line("loss")[1]
    part = max(len(losses) // 4, 1)
    return len(losses) > 1 and statistics.fmean(losses[-part:]) < statistics.fmean(losses[:part])


def _too_fast(run: Run) -> str | None:
    """Spikes and steep gradients: steps that are too large."""
    steps, losses = run.line("loss")
    norms = run.line("grad_norm")[1]
    if len(losses) < ENOUGH:
        return None
    seen = _spike(steps, losses) or _divergence(losses) or _steep(norms)
    if seen is None:
        return None
    rate = run.config["train"]["learning_rate"]
    return f"learning rate: {seen}; set train.learning_rate: {_round(rate / 3)} (now {rate:g})"


def _jumps(values: list[float], least: float) -> list[tuple[float, int, float]]:
    """Where values jump by this share over those before and those behind: (jump, place, level).

    Empty where they are few among many, or no more than how the values scatter.
    """
    found = [(values[i] - max(own), i, max(own)) for i, own in enumerate(_around(values), 1)]
    usual = SCATTER * _scatter(values)
    high = [own for own in found if own[0] > max(least * own[2], usual)]
    return high if len(high) > RARE * len(values) else []


def _around(values: list[float]) -> list[tuple[float, float]]:
    """For each value but the first and the last the medians of those before and those behind."""
    return [
        (statistics.median(values[max(i - AROUND, 0) : i]),
         statistics.median(values[i + 1 :][:AROUND]))
        for i in range(1, len(values) - 1)
    ]  # fmt: skip


def _scatter(values: list[float]) -> float:
    """How far values usually lie from those around them."""
    pairs = zip(values[1:], _around(values), strict=False)
    return statistics.median(abs(value - statistics.fmean(own)) for value, own in pairs)


def _chance(losses: list[float], count: int) -> float:
    """What two means of so many records may differ by where nothing has changed."""
    return CERTAIN * _scatter(losses) / count**0.5


def _spike(steps: list[int], losses: list[float]) -> str | None:
    jumps = _jumps(losses, SPIKE)
    if not jumps:
        return None
    jump, place, level = max(jumps)
    more = f" and {len(jumps) - 1} times more" if len(jumps) > 1 else ""
    return (
        f"the training loss jumped from {level:.3f} to {level + jump:.3f} at step"
        f" {steps[place]}{more}"
    )


def _divergence(losses: list[float]) -> str | None:
    quarter = len(losses) // 4
    means = [statistics.fmean(losses[i:][:quarter]) for i in range(len(losses) - quarter + 1)]
    rise, fall = means[-1] - min(means), losses[0] - min(means)
    if rise <= max(DIVERGED * min(means), GIVEN_BACK * fall, _chance(losses, quarter)):
        return None
    return f"the training loss rose from {min(means):.3f} to {means[-1]:.3f}"


def _steep(norms: list[float]) -> str | None:
    if len(norms) < ENOUGH or not (jumps := _jumps(norms, STEEP_NORM)):
        return None
    jump, _, level = max(jumps)
    return f"the gradient's norm jumped from {level:.3g} to {level + jump:.3g}"


def _clipping(run: Run) -> str | None:
    """Nearly all gradients are cut to one length."""
    norms, clip = run.line("grad_norm")[1], run.config["train"].get("clip_norm")
    if len(norms) < ENOUGH or not clip or statistics.median(norms) <= CLIPPED * clip:
        return None
    middle, share = statistics.median(norms), sum(norm > clip for norm in norms) / len(norms)
    return (
        f"clipping: the gradient's norm was {middle:.3g} at the median, and clipped to {clip:g} in"
        f" {percent(share, '.0f')} of the records; set train.clip_norm: {float(f'{middle:.1g}'):g}"
        f" (now {clip:g})"
    )


def _does_nothing(run: Run) -> str | None:
    """Neither the deltas nor the held-out loss have moved."""
    change = _change(run)
    if change is None or not _is_lora(run):
        return None
    still = bool(run.spectra) and not any(x.norm for x in run.spectra)
    tiny = bool(run.shares) and max(run.shares.values()) < NO_DELTA
    if abs(change) > UNCHANGED or not (still or tiny):
        return None
    moved = "has not moved" if still else f"is {max(run.shares.values()):.1e} of its kernel at most"
    rate = run.config["train"]["learning_rate"]
    return (
        f"the adapter does nothing: its delta {moved}, the held-out loss changed by"
        f" {percent(change, '+.2f')}; set train.learning_rate: {_round(10 * rate)} (now {rate:g}),"
        " or more train.steps"
    )


def _too_slow(run: Run) -> str | None:
    """The loss still falls at the end."""
    losses = run.line("loss")[1]
    quarter = len(losses) // 4
    if len(losses) < ENOUGH or _is_short(run) or any(rule(run) for rule in _AGAINST_MORE):
        return None
    half = max(quarter // 2, 1)
    first, before, last = (
        statistics.fmean(part)
        for part in (losses[:half], losses[-quarter - half : -quarter], losses[-half:])
    )
    fall = before - last
    least = max(STILL_FALLING * (first - last), NOTABLE * last, _chance(losses, half))
    if first <= last or fall <= least:
        return None
    train = run.config["train"]
    length = (
        f"train.steps: {2 * train['steps']}"
        if train.get("steps")
        else f"train.epochs: {2 * train['epochs']:g}"
    )
    return (
        f"still learning: the last quarter brought {percent(fall / (first - last), '.0f')} of the"
        f" fall of the training loss ({before:.3f} to {last:.3f}); set {length}, or"
        f" train.learning_rate: {_round(2 * train['learning_rate'])}"
        f" (now {train['learning_rate']:g})"
    )


def _is_short(run: Run) -> bool:
    """Whether a run has not taken all its steps: it was stopped, or `patience` ended it."""
    if run.about.get("ended", {}).get("early") or not run.steps:
        return True
    return run.steps[-1]["step"] < run.steps[-1]["steps"]


def _unused_rank(run: Run) -> str | None:
    needed = needed_rank(run.spectra)
    given = max((x.rank for x in run.spectra), default=0)
    trained = run.steps[-1]["step"] if run.steps else 0
    if needed is None or given < UNUSED_RANK * needed or trained < FIRST_STEPS:
        return None
    return (
        f"rank: {needed} directions hold 99 % of nine deltas in ten, of {given}; set lora.r:"
        f" {needed}, and leave lora.lora_alpha as it is"
    )


def _padding(run: Run) -> str | None:
    share, data = run.padding, run.config["data"]
    if share is None or share < MOSTLY_PADDING:
        return None
    longest = run.data["lengths"][-1][0]
    if not data.get("packing", True):
        change = "data.packing: true"
    elif longest < data["max_length"]:
        change = f"data.max_length: {longest}"
    else:
        change = "a smaller train.batch_size, or give more rows"
    return f"padding: {percent(share, '.0f')} of the batches is padding; set {change}"


def _masked(run: Run) -> str | None:
    share = run.masked
    if share is None or share < MOSTLY_MASKED:
        return None
    trained, tokens = run.data["trained_tokens"], run.data["tokens"]
    return (
        f"masked: {trained:,} of {tokens:,} tokens are trained on ({percent(1 - share)}); set"
        f" data.train_on: all (now {run.config['data']['train_on']}), or shorten the prompts"
    )


def _lost_rows(run: Run) -> str | None:
    if not run.data:
        return None
    rows, cut, dropped = run.data["rows"], run.data["truncated"], run.data["dropped"]
    lost = sum(dropped.values())
    if cut + lost <= LOST_ROWS * rows:
        return None
    why = f" ({', '.join(f'{n:,}: {reason}' for reason, n in dropped.items())})" if lost else ""
    long = cut > 0 or any("max_length" in reason for reason in dropped)
    change = "a longer data.max_length" if long else "data.train_on, or mend these rows"
    return f"rows: {cut:,} truncated and {lost:,} dropped{why} of {rows:,}; set {change}"


def _change(run: Run) -> float | None:
    """Of the held-out loss, relative to that before."""
    if run.kept is None or len(run.looks) < 2:
        return None
    return run.kept["eval_loss"] / run.looks[0]["eval_loss"] - 1


def _is_lora(run: Run) -> bool:
    return run.config["train"]["method"] == "lora"


def _round(value: float) -> str:
    """One digit, as people write learning rates.

    Example:
        >>> _round(3e-3 / 3), _round(2e-4 / 3)
        ('1e-3', '7e-5')
    """
    digit, _, power = f"{value:.0e}".partition("e")
    return f"{digit}e{int(power)}"


_AGAINST_MORE = (_overfitting, _worse, _too_fast)
"""What forbids to advise more steps, or larger ones."""
_RULES: tuple[Callable[[Run], str | None], ...] = (
    _overfitting,
    _worse,
    _too_fast,
    _clipping,
    _does_nothing,
    _too_slow,
    _unused_rank,
    _padding,
    _masked,
    _lost_rows,
)
