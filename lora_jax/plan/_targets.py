"""Machines that can be compiled for, and what their makers say of them."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from .._errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU besides its memory: it picks kernels by these figures."""

    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """Float32 units of each."""
    clock: float
    """GHz, boosted."""
    shared: int
    """Bytes of shared memory of each; a block may use all but 1,024."""
    threads: int = 2048
    """Threads of each."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator: bytes, bytes per second, and dense FLOP per second.

    Args:
        memory: Bytes that a program may fill.
        bandwidth: Bytes per second from and to that memory.
        bf16: FLOP per second on bfloat16 or float16 operands.
        f32: The same on float32 operands, as JAX multiplies them by default (TF32 on GPUs, one
            pass of bfloat16 on TPUs).
        link: Bytes per second that one device receives from its neighbours, all links together.
        cache: Bytes on the chip that can spare the memory a visit.
        source: Where the figures are from.
        gpu: For XLA; None for a TPU.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    f32: float
    link: float
    cache: float
    source: str
    gpu: Gpu | None = None

    def rate(self, dtype: str) -> float:
        """FLOP per second on operands of a dtype; those of 8 bits are twice as fast at most."""
        if dtype in ("float32", "float64"):
            return self.f32
        return 2 * self.bf16 if "8" in dtype else self.bf16


_XLA = "openxla/xla, xla/backends/gpu/target_config/specs"
_HOPPER = Gpu((9, 0), 132, 128, 1.98, 233472)
_AMPERE = Gpu((8, 0), 108, 64, 1.41, 167936)
_GIB = 2**30
# Of a GPU's memory XLA's allocator gets 95 % at most before the driver and libraries run short.
ROOM = 0.95

GPUS: Mapping[str, Device] = {
    "h200": Device(
        "NVIDIA H200", 151397597184 * ROOM, 4.8e12, 989.4e12, 494.7e12, 450e9, 52428800,
        f"NVIDIA H200 data sheet (halved where it counts sparsity); {_XLA}/h200.txtpb",
        _HOPPER,
    ),
    "h100": Device(
        "NVIDIA H100 SXM 80 GB", 84942979072 * ROOM, 3.352e12, 989.4e12, 494.7e12, 450e9, 52428800,
        f"NVIDIA H100 data sheet (halved where it counts sparsity); {_XLA}/h100_sxm.txtpb",
        _HOPPER,
    ),
    "a100-80": Device(
        "NVIDIA A100 SXM 80 GB", 85100068864 * ROOM, 2.039e12, 312e12, 156e12, 300e9, 41943040,
        f"NVIDIA A100 data sheet; {_XLA}/a100_sxm_80.txtpb",
        _AMPERE,
    ),
    "a100-40": Device(
        "NVIDIA A100 SXM 40 GB", 42331013120 * ROOM, 1.555e12, 312e12, 156e12, 300e9, 41943040,
        f"NVIDIA A100 data sheet; {_XLA}/a100_sxm_40.txtpb",
        _AMPERE,
    ),
    "rtx4090": Device(
        "NVIDIA GeForce RTX 4090", 23.64 * _GIB * ROOM, 1.008e12, 165.2e12, 82.6e12, 32e9,
        75497472,
        "NVIDIA Ada GPU architecture whitepaper, appendix A (float32 accumulation); 23.64 GiB is"
        " what CUDA reports; PCIe 4.0 x16",
        Gpu((8, 9), 128, 128, 2.52, 102400, 1536),
    ),
}  # fmt: skip
"""GPUs by name; `h200x8` is eight of them in one machine. To add a GPU, add a row."""

_CLOUD = "docs.cloud.google.com/tpu/docs"
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TpuKind:
    """A TPU generation and the slices it is rented in."""

    device: Device
    topologies: tuple[str, ...]


TPUS: Mapping[str, TpuKind] = {
    "v4": TpuKind(
        Device("TPU v4", 30.75 * _GIB, 1.228e12, 275e12, 275e12, 300e9, 160 * 2**20,
               f"{_CLOUD}/v4; memory: what the compiler grants"),
        (*_CUBES, "16x16x16"),
    ),
    "v5e": TpuKind(
        Device("TPU v5e", 15.75 * _GIB, 0.819e12, 197e12, 197e12, 200e9, 128 * 2**20,
               f"{_CLOUD}/v5e; memory: what the compiler grants"),
        _FLAT,
    ),
    "v5p": TpuKind(
        Device("TPU v5p", 95.73 * _GIB, 2.765e12, 459e12, 459e12, 600e9, 128 * 2**20,
               f"{_CLOUD}/v5p; memory: what the compiler grants"),
        (*_CUBES, "16x16x16", "16x16x24"),
    ),
    "v6e": TpuKind(
        Device("TPU v6e", 31.24 * _GIB, 1.638e12, 918e12, 918e12, 400e9, 128 * 2**20,
               f"{_CLOUD}/v6e; memory: what the compiler grants"),
        _FLAT,
    ),
}  # fmt: skip
"""TPUs by generation; `v5e:4x4` is a slice of them in JAX's spelling of topologies."""

MOST_GPUS = 8
"""GPUs in one machine."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for: `count` devices, connected as `topology` says."""

    name: str
    platform: str
    device: Device
    count: int
    topology: str = ""


def parse_target(text: str) -> Target:
    """The target that a word names.

    Raises:
        InputError: for a name that is not known, or a topology its kind does not have.

    Example:
        >>> parse_target("v5e:4x4").count, parse_target("h200x8").count
        (16, 8)
    """
    if text == "cpu":
        return Target(text, "cpu", this_machine(), 1)
    if match := re.fullmatch(r"(v\d\w?)(?::(.*))?", text):
        return _tpu(text, match[1], match[2])
    several = re.fullmatch(r"(.+\d)x([1-9][0-9]?)", text)
    name, count = (several[1], int(several[2])) if several else (text, 1)
    if name in GPUS and 1 <= count <= MOST_GPUS:
        return Target(text, "cuda", GPUS[name], count)
    if name in GPUS:
        raise InputError(f"--target: {text}: a machine holds 1 to {MOST_GPUS} GPUs, got {count}")
    raise InputError(f"--target: unknown {text!r}{nearest(text, known())}; known: {_listed()}")


def _tpu(text: str, kind: str, topology: str | None) -> Target:
    if kind not in TPUS:
        raise InputError(f"--target: unknown TPU {kind!r}{nearest(kind, TPUS)}; known: {_listed()}")
    slices = TPUS[kind].topologies
    if topology not in slices:
        got = f"got {topology!r}" if topology else "none was given"
        raise InputError(
            f"--target: {kind} needs one of its topologies, {got}; as {kind}:{slices[0]}, with one"
            f" of {', '.join(slices)}"
        )
    count = math.prod(map(int, topology.split("x")))
    return Target(text, "tpu", TPUS[kind].device, count, topology)


def known() -> list[str]:
    """Names of targets, each TPU with its smallest slice."""
    return ["cpu", *GPUS, *(f"{kind}:{tpu.topologies[0]}" for kind, tpu in TPUS.items())]


def _listed() -> str:
    tpus = ", ".join(f"{kind}:{tpu.topologies[-1]}" for kind, tpu in TPUS.items())
    return f"cpu, {', '.join(GPUS)} (or h200x8 and so on), {tpus} (or another topology)"


def this_machine() -> Device:
    """The computer that asks; nobody's data sheet tells its speed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # what a container may use of it
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return Device("this computer's CPU", memory, 0, 0, 0, 0, 0, "the operating system")


def gpu_text(device: Device) -> str:
    """XLA's `GpuTargetConfigProto` for a GPU, in text form."""
    gpu = device.gpu
    assert gpu is not None
    major, minor = gpu.capability
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared - 1024}
        shared_memory_per_core: {gpu.shared} core_count: {gpu.cores} fpus_per_core: {gpu.fpus}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {device.bandwidth:.0f} l2_cache_size: {device.cache:.0f}
        clock_rate_ghz: {gpu.clock} device_memory_size: {device.memory / ROOM:.0f}
        cuda_compute_capability {{major: {major} minor: {minor}}}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{major: 9 minor: 10 patch: 0}}
    device_description_str: "{device.name}" """
