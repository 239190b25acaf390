"""Plans: what a run will take on a machine, compiled in a process of its own and kept."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._files import package_digest
from ._targets import Target, parse_target

OWNERS = ("base", "scales", "adapter", "optimizer", "gradients", "activations", "temporaries",
          "other")  # fmt: skip
"""Whose the bytes on a device are, in the order they are shown."""

_PACKAGE = Path(__file__).parents[1]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_TRACEBACK_FILTERING": "off",
}
"""What a process that compiles is told: a TPU's compiler looks for one, and for its neighbours."""
_COMPILING = ("XLA_", "JAX_", "LIBTPU_", "TPU_")
"""Beginnings of variables that change what is compiled."""
_COMPILERS = {
    "tpu": ("libtpu", "plan-tpu"),
    "cuda": ("jax_plugins.xla_cuda13", "plan-gpu"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of a run takes on one device of a target: compiled, not run.

    Args:
        target: As `parse_target` reads it.
        model: Path, layers, width, parameters, trainable.
        run: The settings that count, by the names of their config keys.
        owners: Bytes on the device, by `OWNERS`; `activations` are what the forward pass keeps
            for the backward pass, `temporaries` all else that lives within a step.
        total: Bytes on the device at the peak of a step.
        host: Bytes of the host's memory that are copied to and fro.
        flops: FLOPs of one step's matrix products, by the dtype of their operands.
        traffic: Bytes that a step moves to and from the device's memory at least, without what its
            cache may hold; None where the compiler refused the program.
        collectives: Exchanges with other devices in a step: kind, count, bytes, received.
        refused: Why the compiler refused the program, or None.
        versions: What it was compiled with.
        seconds: How long compiling took.
    """

    target: Target
    model: Mapping[str, Any]
    run: Mapping[str, Any]
    owners: Mapping[str, int]
    total: int
    host: int
    flops: Mapping[str, int]
    traffic: int | None
    collectives: Sequence[Mapping[str, Any]]
    refused: str | None
    versions: Mapping[str, str]
    seconds: float

    @property
    def limit(self) -> float:
        """Bytes that a program may fill on the device."""
        return self.target.device.memory

    @property
    def fits(self) -> bool:
        """Whether the device holds a step."""
        return self.refused is None and self.total <= self.limit

    @property
    def compiled(self) -> bool:
        """Whether the sizes are those of a program, and not what it needs without temporaries."""
        return self.refused is None or not self.refused.startswith("not compiled")

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what limits it: a roofline, not a prediction.

        FLOPs over the device's peak, bytes over its bandwidth, bytes received over its links
        (Williams, Waterman and Patterson 2009, "Roofline"). Empty where no data sheet tells.
        """
        device = self.target.device
        if not device.bandwidth:
            return {}
        compute = sum(n / device.rate(dtype) for dtype, n in self.flops.items())
        bounds = {"compute": compute, "memory": (self.traffic or 0) / device.bandwidth}
        received = sum(x["received"] for x in self.collectives)
        return bounds | ({"links": received / device.link} if received else {})

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain values, for scripts."""
        plain = dataclasses.asdict(self)
        plain["target"] = self.target.name
        return plain | {
            "device": self.target.device.name,
            "devices": self.target.count,
            "limit": self.limit,
            "fits": self.fits,
            "bound_seconds": self.bounds,
        }


def plan(
    config: Any,
    target: str = "cpu",
    overrides: Sequence[str] = (),
    *,
    at_most: float | None = None,
) -> Plan:
    """Compile the train step of a config for a machine that need not be here.

    Neither weights nor data are read: of the model, only its `config.json`.  Nothing is run, and
    no time is predicted.  What was compiled before is read from a cache in the user's cache
    directory, as long as the config, the files it names, this package and its compilers are the
    same.

    Args:
        config: Path of a run's YAML file, or a `RunConfig`.
        target: `cpu`, a GPU such as `h200` or `h200x8`, or a TPU slice such as `v5e:4x4`; a run
            uses one device of it.
        overrides: `--section.key value` words laid over the config.
        at_most: Do not compile what needs more bytes than that even without temporaries.

    Raises:
        InputError: for an unknown target, whatever in the config does not fit, a compiler that is
            not installed or that ends its process.

    Example:
        >>> from lora_jax.train import DataSection, RunConfig, TrainSection
        >>> config = RunConfig(data=DataSection(train="rows.jsonl"), output="runs/mine",
        ...                    train=TrainSection(batch_size=2))
        >>> plan(config, "cpu").fits
        True
    """
    goal = parse_target(target)
    text, where = _text(config)
    request = {"text": text, "where": where, "overrides": list(overrides), "target": target}
    request["at_most"] = at_most
    # What was compiled in full answers for any limit.
    keys = [_key({**request, "at_most": limit}, goal) for limit in dict.fromkeys((None, at_most))]
    entries = [_cache() / f"{key}.json" for key in keys]
    made = next(filter(None, map(_kept, entries)), None)
    if made is None:
        made = _compile(request, goal)
        _keep(entries[0 if "arguments" in made["compiled"] else -1], made)
    return _plan(goal, made)


def _text(config: Any) -> tuple[str, str]:
    """The YAML of a config, and a name for it."""
    if not isinstance(config, str | Path):
        from ..train import config_text

        return config_text(config), "config"
    try:
        return Path(config).read_text("utf-8"), str(config)
    except OSError as error:
        raise InputError(f"{config}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{config}: not a text in UTF-8") from None


def _plan(target: Target, made: Mapping[str, Any]) -> Plan:
    compiled, owners = made["compiled"], dict(made["owners"])
    refused = compiled.get("refused")
    gradients, activations = owners["gradients"], owners["activations"]
    given = sum(owners.values()) - gradients - activations
    if refused:
        total = compiled["total"] or 0
        total = max(total, given + gradients + activations)
        temporaries = total - given
    else:
        total, temporaries = compiled["total"], compiled["temporaries"]
    # What is optimized away is not there: the parts never exceed what the compiler counts.
    owners["gradients"] = min(gradients, temporaries)
    owners["activations"] = min(activations, temporaries - owners["gradients"])
    owners["temporaries"] = temporaries - owners["gradients"] - owners["activations"]
    owners["other"] = max(total - sum(owners.values()), 0)
    return Plan(
        target=target,
        model=made["model"],
        run=made["run"],
        owners={name: owners[name] for name in OWNERS},
        total=total,
        host=compiled.get("host", made["kept_on_host"]),
        flops=made["flops"],
        traffic=compiled.get("traffic"),
        collectives=compiled.get("collectives", []),
        refused=refused,
        versions=made["versions"],
        seconds=made["seconds"],
    )


def _compile(request: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Let a process of its own compile, and give what it found."""
    _check_compiler(target)
    path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "plan.json")
        run = subprocess.run(
            [sys.executable, "-P", "-m", "lora_jax.plan._child", str(output)],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if not output.exists():
            raise InputError(f"{target.name}: {_ending(run.returncode, run.stderr)}")
        result = json.loads(output.read_text("utf-8"))
    if "error" in result:
        raise InputError(result["error"])
    return result["plan"]


def _check_compiler(target: Target) -> None:
    module, extra = _COMPILERS.get(target.platform, ("", ""))
    try:
        found = not module or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise InputError(
            f"--target: {target.name} needs a compiler that is not installed; ./lora install"
            f" {extra} adds it, or pip install 'lora_jax[{extra}]'"
        )


def _ending(code: int, errors: str) -> str:
    """How a process ended that left no result."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = next((x for x in reversed(lines) if not x.startswith(("@", "*", "PC:"))), "nothing said")
    how = f"with exit status {code}"
    if code < 0:
        how = f"by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        said = "this computer's memory may be too small to compile in"
    return f"the compiler's process ended {how}: {said[:300]}"


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "lora_jax", "plans")


def _key(request: Mapping[str, Any], target: Target) -> str:
    """What a plan depends on, but for the files that its config names."""
    names = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
    told = {
        **request,
        "place": os.getcwd(),
        "device": dataclasses.asdict(target),
        "package": package_digest(),
        "versions": [_version(name) for name in names],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_COMPILING)},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kept(entry: Path) -> dict[str, Any] | None:
    """A plan of the cache, if every file that it read is as it was."""
    try:
        made = json.loads(entry.read_text("utf-8"))
        return made if made["files"] == {name: _digest(name) for name in made["files"]} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(entry: Path, made: dict[str, Any]) -> None:
    from .._files import atomic_file

    made["files"] = {name: _digest(name) for name in made["files"]}
    try:
        with atomic_file(entry) as temporary:
            temporary.write_text(json.dumps(made), "utf-8")
    except InputError:
        pass  # A cache that cannot be written is none.


def _digest(name: str) -> str | None:
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError:
        return None
