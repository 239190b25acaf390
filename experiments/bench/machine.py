"""The machine under the measurement: its threads, how busy it is, memory, versions."""

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "qwix", "torch", "transformers", "peft", "bitsandbytes",
    "numpy",
)  # fmt: skip
QUIET_LOAD = 0.25
"""One-minute load average of a processor below which nobody else seems to be there."""
QUIET_SHARE = 0.05
"""Share of all processors that others may use."""
_TICK = os.sysconf("SC_CLK_TCK")


def pin(threads: int) -> None:
    """Stay on the first `threads` processors, so that a library's own count is no more."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:threads])


def busy_seconds() -> float:
    """Processor seconds that the whole machine has worked since it started, steal included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICK


def process_seconds(pid: int | str) -> float:
    """Processor seconds of a process so far, all threads; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICK


def others_share(seconds: float = 2.0) -> float:
    """Share of the processors that others keep busy while this process sleeps."""
    before, own = busy_seconds(), process_seconds("self")
    start = time.monotonic()
    time.sleep(seconds)
    used = busy_seconds() - before - (process_seconds("self") - own)
    return max(used, 0.0) / (time.monotonic() - start) / (os.cpu_count() or 1)


def wait_for_quiet(patience: float) -> dict[str, Any]:
    """Wait at most `patience` seconds for a quiet machine; what was found at the end."""
    end = time.monotonic() + patience
    while True:
        load, share = os.getloadavg()[0], others_share()
        quiet = load <= QUIET_LOAD * (os.cpu_count() or 1) and share <= QUIET_SHARE
        if quiet or time.monotonic() > end:
            return {"load_average": round(load, 2), "others": round(share, 3), "quiet": quiet}
        time.sleep(5)


def resident() -> int:
    """Bytes of this process in memory, once freed memory has been handed back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_resident() -> int:
    """Highest number of bytes since the process began or `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak start again from what is in memory now."""
    resident()
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def describe() -> dict[str, Any]:
    """Versions, hardware, date and commit of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p)) is not None},
        "hardware": {
            "processor": _processor(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit that is checked out, with a plus where files differ from it."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                check=True,
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    # Results of the suite itself are no change of what is measured.
    changed = [line for line in changes.splitlines() if "experiments/bench/" not in line]
    return head + ("+" if changed else "")
