"""Measures the device's ceilings: its memory, a copy, and matrix products in bf16 and FP8."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import Item, Record, SuiteSize
from benchmarks.run import DTYPES, milliseconds, nvidia_smi, spread
from fastrepa_kernels.cost import Ceilings, matmul_cost, measure_ceilings, median_seconds

E4M3_MOST = torch.finfo(torch.float8_e4m3fn).max
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
"""A block's Linears: in and out, in widths."""
WAYS = ("forward", "dgrad", "wgrad")
SUSTAINED = 3.0
"""Seconds: power is averaged over about one."""


def items(stage: str, size: SuiteSize, out: Path) -> Iterator[Item]:
    device = torch.device(size.device)
    yield Item("device", partial(_device, device))
    yield Item("ceilings", partial(_ceilings, device, DTYPES[size.dtype]))
    yield Item("sustained", partial(_sustained, size))
    for recipe in size.recipes:
        for layer in LAYERS:
            yield Item(f"{recipe} {layer}", partial(_products, recipe, layer, size), limit=30)


def ceilings(out: Path, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return those that are recorded for this device, else measure them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    for record in reversed(records.load(out)):
        if "bytes_per_second" in record and name in (None, record["device"]):
            return Ceilings(record["bytes_per_second"], record["flops_per_second"])
    return measure_ceilings(device, dtype)


def _device(device: torch.device) -> Iterator[Record]:
    record: Record = {"cudnn": torch.backends.cudnn.version(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "free_bytes": free, "total_bytes": total, "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    yield record


def _ceilings(device: torch.device, dtype: torch.dtype) -> Iterator[Record]:
    yield asdict(measure_ceilings(device, dtype))


def _sustained(size: SuiteSize, turns: int = 6) -> Iterator[Record]:
    """Repeat fc1's forward product: power may allow less than a short trial shows."""
    device = torch.device(size.device)
    into, outof = (part * size.width for part in LAYERS["fc1"])
    work, _ = _product("bf16", "forward", size.rows, outof, into, device)
    flops = matmul_cost(size.rows, outof, into, 2).flops
    once = median_seconds(work, device, 5)
    for turn in range(turns):
        repeats = max(1, round(SUSTAINED / turns / once))
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        clocks = _clocks() if device.type == "cuda" else {}  # while it runs
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        yield {
            "case": "sustained", "turn": turn, "mnk": [size.rows, outof, into],
            "sustained_tflops": flops * repeats / took / 1e12, **clocks,
        }  # fmt: skip


def _clocks() -> Record:
    """SM clock in MHz, power in W and the driver's reasons for it, a bit mask; or nothing."""
    said = nvidia_smi("clocks.sm", "power.draw.instant", "clocks_event_reasons.active")
    if not said:
        return {}
    return {"sm_mhz": float(said[0]), "watts": float(said[1]), "clock_reasons": said[2]}


def _products(recipe: str, layer: str, size: SuiteSize) -> Iterator[Record]:
    """The three products of one Linear in one recipe. FP8 operands are made beforehand: what
    quantising costs is bytes over bandwidth, beside this.
    """
    device = torch.device(size.device)
    into, outof = (part * size.width for part in LAYERS[layer])
    for way in WAYS:
        m, n, k = {
            "forward": (size.rows, outof, into),
            "dgrad": (size.rows, into, outof),
            "wgrad": (outof, into, size.rows),
        }[way]
        work, error = _product(recipe, way, m, n, k, device)
        times = spread(milliseconds(work, device, size.repeats))
        yield {
            "case": "product", "recipe": recipe, "layer": layer, "way": way, "mnk": [m, n, k],
            **times, "error": error,
            "tflops": matmul_cost(m, n, k, 2).flops / times["p50_ms"] / 1e9,
        }  # fmt: skip


def _product(
    recipe: str, way: str, m: int, n: int, k: int, device: torch.device
) -> tuple[Callable[[], Tensor], float]:
    """Return a product [m, k] x [k, n] of normal values, its operands laid out as training has
    them, and its relative error against float64 on the first 128 rows.
    """
    a, b = (torch.randn(size, k, device=device, dtype=torch.bfloat16) for size in (m, n))
    if recipe == "bf16":
        # Forward reads rows of x and w; dgrad w as [k, n]; wgrad dy and x as [rows, m] and [k, n].
        left = a.t().contiguous().t() if way == "wgrad" else a
        right = b.t() if way == "forward" else b.t().contiguous()

        def work() -> Tensor:
            return left @ right
    else:
        dim = 1 if recipe == "fp8 rowwise" else None
        (left, scale_left), (right, scale_right) = _quantised(a, dim), _quantised(b, dim)

        def work() -> Tensor:
            return torch._scaled_mm(
                left, right.t(), scale_left, scale_right.t() if dim else scale_right,
                out_dtype=torch.bfloat16, use_fast_accum=way == "forward",
            )  # fmt: skip

    some = slice(0, 128)
    exact = a[some].double() @ b.double().t()
    error = (work()[some].double() - exact).norm() / exact.norm()
    return work, error.item()


def _quantised(t: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return t / scale in e4m3 and the fp32 scale, of the tensor or of each row [R, 1]."""
    most = t.abs().amax() if dim is None else t.abs().amax(dim, keepdim=True)
    scale = most.float().clamp_min(1e-12) / E4M3_MOST
    return (t.float() / scale).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn), scale
