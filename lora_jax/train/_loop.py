"""The training loop: step, log, measure, save."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import InputError
from .._interrupt import Stopped, StopRequest, stop_signals
from .._tree import combine
from ..data import BatchIterator, eval_batches
from ._about import write_end, write_start
from ._checkpoint import Checkpoints
from ._config import RunConfig
from ._evaluate import Evaluation, evaluate, make_eval_step
from ._hosts import agreed_stop, check_shared, is_first, largest, several_hosts
from ._job import Job, prepare
from ._metrics import Listener, MetricsLog, notice, peak_memory
from ._optimizer import learning_rate
from ._program import make_program
from ._rundir import Resume, open_directory, resume_command
from ._samples import answer_after, answer_before
from ._save import save_result
from ._start import training_batches
from ._step import LOWEST_SCALE
from ._watch import alone


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left: `before` and `after` are held-out, `trainable` the kept weights."""

    directory: Path
    steps: int
    before: Evaluation
    after: Evaluation
    trainable: dict[str, Any]
    stopped_early: bool


@dataclasses.dataclass
class _Progress:
    """What a checkpoint keeps in words: how far, and the held-out losses so far."""

    tokens: int = 0
    before: Evaluation | None = None
    last: Evaluation | None = None
    best: Evaluation | None = None
    looks_since_best: int = 0
    stopped: bool = False

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "_Progress":
        values: dict[str, Any] = {
            name: Evaluation(**value) if isinstance(value, dict) else value
            for name, value in raw.items()
        }
        return cls(**values)


def train(config: RunConfig, *, resume: Resume = False, listener: Listener | None = None) -> Result:
    """Run a config from its files to a saved adapter.

    Args:
        config: As from `load_config`.
        resume: Go on from the newest whole checkpoint in `config.output`, bit for bit; "auto" does
            so where a run was begun, and begins one elsewhere.
        listener: Called with every record of `metrics.jsonl`.

    Returns:
        The result; on disk `adapter/` in PEFT's format (or `model/`, in full training),
        `config.yaml`, `metrics.jsonl`, `run.json`, `samples.json`, `checkpoints/`.

    Raises:
        InputError: for anything wrong with the config or its files; if the loss stops being
            finite (the last good checkpoint stays); if a file cannot be written.
        Stopped: after SIGTERM or Ctrl-C, once the step at hand is done and saved.

    Example:
        >>> import tempfile
        >>> from lora_jax import LoraConfig
        >>> from lora_jax.train import DataSection, RunConfig, TrainSection, train
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result = train(RunConfig(
        ...         data=DataSection(train="stdlib", train_rows=20, eval_share=0.2, max_length=256),
        ...         lora=LoraConfig(r=4, target_modules="all-linear"),
        ...         train=TrainSection(steps=2, batch_size=2, tensorboard=False, samples=0),
        ...         output=f"{directory}/run",
        ...     ))
        >>> result.steps
        2
    """
    return run(prepare(config), resume=resume, listener=listener)


def run(job: Job, *, resume: Resume = False, listener: Listener | None = None) -> Result:
    """Train a job that `prepare` made ready; otherwise as `train`.

    Full training uses up the weights of the job: two copies of a model may be one too many.
    """
    with (agreed_stop if several_hosts() else stop_signals)() as asked:
        # Nothing is written before the data and the optimizer are known to be right.
        loop = _Loop(job, listener)
        check_shared(Path(job.config.output))
        with open_directory(job.config, resume) as opened, _errors(opened.directory, loop, asked):
            loop.open(opened.directory, opened.begun)
            return loop.run(asked)


def steps_of(config: RunConfig, batches: BatchIterator) -> int:
    """The number of optimizer steps a config asks for."""
    if config.train.steps is not None:
        return config.train.steps
    whole = config.train.epochs * batches.batches_per_epoch / config.train.accumulate
    return max(math.ceil(whole - 1e-9), 1)


def job_batches(job: Job) -> BatchIterator:
    """The training batches of a job, from their beginning."""
    return training_batches(job.config, job.train, job.pretrained, job.own_rows)


class _Loop:
    """One run: its compiled functions, its place, its files."""

    def __init__(self, job: Job, listener: Listener | None) -> None:
        c = job.config
        self.job, self.listener = job, listener
        self.batches = job_batches(job)
        self.steps = steps_of(c, self.batches)
        self.rate = learning_rate(c.train, self.steps)
        self.step, init = make_program(job, self.steps)
        self.state = init(job.trainable)
        self.eval_step = make_eval_step(job.model, chunk=c.train.loss_chunk, mesh=job.mesh)
        self.best: dict[str, Any] | None = None
        self.progress = _Progress()
        self.window: list[dict[str, Any]] = []

    def open(self, directory: Path, begun: bool) -> None:
        """Open the files, and go to the place of the newest whole checkpoint."""
        c = self.job.config.train
        self.directory = directory
        self.checkpoints = Checkpoints(directory / "checkpoints", c.keep)
        saved = self.checkpoints.restore(self._like) if begun else None
        if saved is not None:
            self.batches.set_state(saved.place["data"])
            self.progress = _Progress.from_json(saved.place["progress"])
            self.state, self.best = saved.tree
        step = None if saved is None else saved.step
        if begun:
            where = "its beginning, since nothing was saved" if saved is None else f"step {step}"
            notice(f"{directory}: going on from {where}")
        if is_first():
            self.log = MetricsLog(directory, tensorboard=c.tensorboard, resumed_from=step)

    def _like(self, place: dict[str, Any]) -> Any:
        """Arrays such as those of a checkpoint with this place."""
        has_best = place["progress"]["best"] is not None
        return self.state, self.state.trainable if has_best else None

    def close(self) -> None:
        """Close whatever was opened."""
        for name in ("log", "checkpoints"):
            if hasattr(self, name):
                getattr(self, name).close()

    def run(self, asked: StopRequest) -> Result:
        at = int(self.state.step)
        write_start(self.job, self.directory, at, self.batches.batches_per_epoch)
        if self.progress.before is None:
            answer_before(self.job, combine(self.job.base, self.state.trainable), self.directory)
            self.progress.before = self._look(0)
        self.started = time.perf_counter()
        while at < self.steps and not self.progress.stopped:
            if asked.is_set():
                self._stop(at, asked.code)
            self._one_step(at)
            at += 1
            self._after_step(at)
        return self._finish(at)

    def _stop(self, at: int, code: int) -> NoReturn:
        """Save what is not saved yet, and say how to go on."""
        again = resume_command(self.directory)
        if at == 0:
            nothing = "stopped before the first step, so nothing is saved yet"
            _end(f"{self.directory}: {nothing}; {again} starts again", code)
        if self.checkpoints.latest() != at:
            if self.window:
                self._log(at)
            self._save(at)
        _end(f"{self.directory}: stopped and saved at step {at}; {again} goes on", code)

    def _one_step(self, at: int) -> None:
        with alone("reading its rows"):
            parts = [next(self.batches) for _ in range(self.job.config.train.accumulate)]
        batch = {name: np.stack([p[name] for p in parts]) for name in parts[0]}
        rows = batch.pop("rows")
        self.state, metrics = self.step(self.state, self.job.base, self.job.batch(batch))
        self.window.append({"step": at + 1, "rows": rows, **metrics})

    def _after_step(self, at: int) -> None:
        """Log, measure and save where that is due, in this order."""
        c, last = self.job.config.train, at == self.steps
        look = last or _due(c.eval_every, at)
        save = last or _due(c.save_every, at)
        if look or save or _due(c.log_every, at):
            self._log(at)
        if look:
            self._judge(self._look(at), last)
        if save or self.progress.stopped:
            self._save(at)

    def _log(self, at: int) -> None:
        """Fetch the window's metrics from the device, which is waited for here alone."""
        window, self.window = jax.device_get(self.window), []
        self._check_finite(window)
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        read, trained = (sum(int(w[k]) for w in window) for k in ("read", "tokens"))
        self.progress.tokens += read
        self._record(
            {
                "step": at,
                "steps": self.steps,
                "loss": sum(float(w["loss"]) * int(w["tokens"]) for w in window) / trained,
                "learning_rate": float(np.asarray(self.rate(at - 1))),
                "grad_norm": float(window[-1]["grad_norm"]),
                "tokens": self.progress.tokens,
                "tokens_per_second": read / seconds,
                "epoch": round(self.batches.epoch, 4),
                "peak_memory_bytes": largest(peak_memory()),
            }
        )

    def _check_finite(self, window: list[dict[str, Any]]) -> None:
        bad = next((w for w in window if _diverged(w)), None)
        if bad is None:
            return
        saved = self.checkpoints.latest()
        kept = (
            "nothing is saved yet" if saved is None else f"the checkpoint of step {saved} is kept"
        )
        raise InputError(
            f"{self.directory}: the loss, its gradient or the update is not finite at step"
            f" {bad['step']} (rows {self._places(bad['rows'])}); {kept}; look at these rows, or go"
            " on with --resume --train.learning_rate and a lower rate"
        )

    def _places(self, rows: np.ndarray, shown: int = 6) -> str:
        """Where the rows of a step stand in their files."""
        places = [
            self.job.places.get(row, str(row)) for row in np.unique(rows).tolist() if row >= 0
        ]
        more = f" and {len(places) - shown} more" if len(places) > shown else ""
        return ", ".join(places[:shown]) + more

    def _look(self, at: int) -> Evaluation:
        """Measure the held-out loss."""
        c = self.job.config
        batches = eval_batches(
            self.job.eval,
            batch_size=c.train.batch_size,
            seq_length=c.data.seq_length,
            packing=c.data.packing,
            pad_id=self.job.pretrained.tokenizer.pad_id or 0,
            own_rows=self.job.own_rows,
        )
        params = combine(self.job.base, self.state.trainable)
        try:
            found = evaluate(self.eval_step, params, map(self.job.batch, batches))
        except InputError as error:
            cause = f" {c.model.dtype}, or at train.learning_rate {c.train.learning_rate:g}"
            raise InputError(f"{self.directory}: after step {at}: {error}{cause}") from None
        self._record({"step": at, "eval_loss": found.loss, "eval_tokens": found.tokens})
        self.progress.last, self.started = found, time.perf_counter()
        return found

    def _judge(self, found: Evaluation, last: bool) -> None:
        """Keep the best weights and stop where none came for a while, if `patience` says so."""
        progress, patience = self.progress, self.job.config.train.patience
        if patience is None:
            return
        if progress.best is None or found.loss < progress.best.loss:
            progress.best, progress.looks_since_best = found, 0
            # A copy: the next step donates the arrays.
            self.best = jax.tree.map(jnp.copy, self.state.trainable)
        else:
            progress.looks_since_best += 1
            progress.stopped = progress.looks_since_best >= patience and not last

    def _save(self, at: int) -> None:
        progress = dataclasses.asdict(self.progress)
        place = {"data": self.batches.get_state(), "progress": progress}
        self.checkpoints.save(at, (self.state, self.best), place)

    def _record(self, record: dict[str, Any]) -> None:
        if not is_first():
            return
        with alone("writing metrics.jsonl"):
            self.log(record)
        if self.listener is not None:
            self.listener(record)

    def _finish(self, at: int) -> Result:
        progress = self.progress
        trainable: dict[str, Any] = self.state.trainable if self.best is None else self.best
        save_result(self.job, self.directory, trainable)
        answer_after(self.job, combine(self.job.base, trainable), self.directory)
        write_end(self.directory, at, early=progress.stopped)
        after = progress.best or progress.last
        assert progress.before is not None and after is not None
        return Result(self.directory, at, progress.before, after, trainable, progress.stopped)


def _end(message: str, code: int, *, in_order: bool = True) -> NoReturn:
    """Say why, and end."""
    if in_order or not several_hosts():  # else the watch over the others says so
        notice(message)
    raise Stopped(message, code, in_order=in_order)


def _due(every: int | None, at: int) -> bool:
    return every is not None and at % every == 0


def _diverged(metrics: dict[str, Any]) -> bool:
    """Not finite, and no matter of the loss scale: that is found by overflowing now and then."""
    scaled_down = float(metrics["loss_scale"]) <= LOWEST_SCALE
    return not (np.isfinite(metrics["loss"]) and (metrics["finite"] or not scaled_down))


@contextlib.contextmanager
def _errors(directory: Path, loop: _Loop, asked: StopRequest) -> Iterator[None]:
    """A full disk or an interruption in one line; the files are closed either way."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{directory}: cannot write: {error.strerror or error}") from error
    except KeyboardInterrupt:
        again = f"{resume_command(directory)} goes on from the newest checkpoint"
        _end(f"{directory}: interrupted; {again}", asked.code or 130, in_order=False)
    finally:
        loop.close()
