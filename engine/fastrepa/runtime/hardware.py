"""GPUs and the links between them by their datasheets, and this machine's CPU by what its system
says: nothing is measured.

Bandwidths of links are per direction. `collective_seconds` is the alpha-beta model: a latency per
call and a bandwidth, with the volumes of ring algorithms (Thakur et al. 2005).
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastrepa.errors import ConfigError, nearest


@dataclass(frozen=True)
class GPU:
    """One GPU of an eight-GPU server. Bytes and FLOP/s are decimal, as datasheets print them.

    bf16 is the dense rate (half of what is printed "with sparsity"); fp32 that without tensor
    cores, which is what torch computes float32 products with by default. nvlink: to the other GPUs
    of the server; network: its share of the server's adapters. Both per direction.
    """

    title: str
    memory: float
    bf16: float
    fp32: float
    hbm: float
    nvlink: float
    network: float
    source: str


GPUS = {
    "a100": GPU(
        "A100 SXM 80 GB", 80e9, 312e12, 19.5e12, 2039e9, 300e9, 25e9,
        "NVIDIA A100 80GB datasheet (2021); DGX A100 datasheet: 8 x 200 Gb/s",
    ),
    "h100": GPU(
        "H100 SXM 80 GB", 80e9, 989e12, 67e12, 3350e9, 450e9, 50e9,
        "NVIDIA H100 datasheet (2022); DGX H100 datasheet: 8 x 400 Gb/s",
    ),
    "h200": GPU(
        "H200 SXM 141 GB", 141e9, 989e12, 67e12, 4800e9, 450e9, 50e9,
        "NVIDIA H200 datasheet (2023); DGX H200 datasheet: 8 x 400 Gb/s",
    ),
    "b200": GPU(
        "B200 SXM 180 GB", 180e9, 2250e12, 80e12, 8000e9, 900e9, 50e9,
        "NVIDIA Blackwell architecture brief, HGX B200 (2024); DGX B200 datasheet: 8 x 400 Gb/s",
    ),
}  # fmt: skip


def find_gpu(name: str) -> GPU:
    """The row of `name`, in any case; ConfigError names it and what is allowed."""
    if name.lower() not in GPUS:
        raise ConfigError(
            f"--gpu: {name!r} is not one of {', '.join(GPUS)}{nearest(name.lower(), GPUS)}"
        )
    return GPUS[name.lower()]


# torch's names of the devices that GPUS is about; PCIe and NVL cards are slower and not among them
# (of the A100 all forms have the same rates).
DEVICE_NAMES = (
    (re.compile(r"\bA100\b"), "a100"),
    (re.compile(r"\bH100\b.*\bHBM3\b"), "h100"),
    (re.compile(r"\bH200\b(?! NVL)"), "h200"),
    (re.compile(r"\bB200\b"), "b200"),
)


def peak_flops(device_name: str, *, bf16: bool) -> float | None:
    """The datasheet's FLOP/s of a device by torch's name for it; None where GPUS has no row."""
    for pattern, row in DEVICE_NAMES:
        if pattern.search(device_name):
            return GPUS[row].bf16 if bf16 else GPUS[row].fp32
    return None


def cpu_name() -> str:
    """The model of this machine's CPU, or its architecture where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use, by its affinity and by the CPU quotas of its cgroup and
    of those around it; a part of a core is none, and one is the least.
    """
    affine = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affine(0)) if affine else os.cpu_count() or 1
    return max(1, math.floor(min([cores, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each cgroup around this process may take, of both versions."""
    groups = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    mounts = [line.partition(" - ") for line in _lines(root / "proc/self/mountinfo")]
    for where, _, what in mounts:
        if len(fields := where.split()) < 5 or what.count(" ") < 2:
            continue
        top, point = fields[3:5]
        kind, _, options = what.split(" ", 2)
        if kind != "cgroup2" and (kind != "cgroup" or "cpu" not in options.split(",")):
            continue
        for _, controllers, path in (group for group in groups if len(group) == 3):
            if ("cpu" in controllers.split(",")) if kind == "cgroup" else not controllers:
                # In a container the mount may begin at the group, or the group lie outside of it.
                inside = PurePosixPath(path)
                known = inside.is_relative_to(top) and ".." not in inside.parts
                below = inside.relative_to(top) if known else PurePosixPath()
                folders = (below, *below.parents)
                yield from (_quota(root / point.lstrip("/") / folder) for folder in folders)


def _lines(file: Path) -> list[str]:
    """The lines of a file of the system, none where it is not; mounts are named by any bytes."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []


def _quota(group: Path) -> float:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # "max" is no number
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
    return math.inf


@dataclass(frozen=True)
class Links:
    """Bandwidths [bytes/s, per GPU and direction] that collectives reach, and latencies [s]."""

    per_node: int
    nvlink: float
    network: float
    nvlink_latency: float = 5e-6
    network_latency: float = 15e-6

    def bandwidth(self, world: int) -> float:
        """Return the bandwidth of rings over `world` GPUs.

        Across servers there is a ring per adapter, each with its share of the data: a server's
        adapters together are what NVLink is compared with.
        """
        if world <= self.per_node:
            return self.nvlink
        return min(self.nvlink, self.per_node * self.network)

    def latency(self, world: int) -> float:
        """Return the seconds of one pass down a tree over `world` GPUs."""
        inside = min(world, self.per_node)
        nodes = math.ceil(world / self.per_node)
        return (
            math.ceil(math.log2(inside)) * self.nvlink_latency
            + math.ceil(math.log2(nodes)) * self.network_latency
        )

    def collective_seconds(self, op: str, size: float, calls: float, world: int) -> float:
        """Seconds of `calls` collectives over `world` GPUs that move whole tensors of `size` bytes
        in all: size is that of the whole tensor, before or after it is cut into shards.
        """
        passes = 2 if op == "all_reduce" else 1
        return passes * (
            calls * self.latency(world) + size * (world - 1) / world / self.bandwidth(world)
        )
