"""FLOPs and least bytes of operations, the ceilings a device really reaches, and the share of them.

`Cost` counts multiply and add as two FLOPs, and each input read once and each output written once.
`measure_ceilings` times a large copy and a large matrix product on the device at hand: a roofline
from a datasheet is never used. The larger of flops/rate and bytes/bandwidth is the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """The FLOPs of an operation and the least bytes that it moves."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Ceilings:
    """The measured rates of a device: copy bandwidth (read + write) and matrix products."""

    bytes_per_second: float
    flops_per_second: float

    def floor_seconds(self, cost: Cost) -> float:
        """Return the least time that `cost` can take at these rates."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)


def matmul_cost(m: int, n: int, k: int, itemsize: int) -> Cost:
    """Count [m, k] times [k, n]."""
    return Cost(flops=2 * m * n * k, bytes=itemsize * (m * k + k * n + m * n))


def diffusion_transformer_flops(
    batch: int, tokens: int, width: int, depth: int, *, mlp_ratio: int = 4, patch_values: int = 16
) -> int:
    """Count the forward FLOPs of a class-conditional SiT/DiT's matrix products (no projector).

    Per token and block: qkv 3 D^2, attention 2 T D, out D^2, MLP 2 ratio D^2; per image and block:
    the 6 D^2 of adaLN; plus patch embedding, time embedding (256 -> D -> D) and final layer.
    """
    d = width
    block = tokens * ((4 + 2 * mlp_ratio) * d * d + 2 * tokens * d) + 6 * d * d
    ends = tokens * 2 * patch_values * d + (256 * d + d * d) + 2 * d * d
    return 2 * batch * (depth * block + ends)


def measure_ceilings(device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Time a device-to-device copy and a square matrix product of random values on `device`.

    CUDA: a 2 GiB copy and an 8192^3 product, medians of 20. CPU: 256 MiB and 1024^3, medians of 5.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    repeats = 20 if on_gpu else 5
    source = torch.empty((2 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device)
    source.random_(0, 255)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, repeats)
    moved = 2 * source.numel()
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, device, repeats)
    return Ceilings(bytes_per_second=moved / copy, flops_per_second=2 * side**3 / product)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of `work`, by device events on CUDA, after three warm-up calls."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            torch.cuda.synchronize(device)
            times.append(first.elapsed_time(last) / 1000)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
