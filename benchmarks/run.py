"""Measure cases and append one JSON line per provider and direction to benchmarks/records/.

    python -m benchmarks.run projector_alignment --device cpu
    python -m benchmarks.run --device cuda --dtype bf16

Before anything is timed, every provider's outputs and gradients are compared with float64 on the
same widths at a batch of two: ours may be at most twice as wrong as eager plus one rounding unit,
a rival four times that; a wrong provider is reported and not timed. Providers take turns, iteration
by iteration, on the same inputs, so that a disturbance of the machine meets them all. On CUDA
inputs rotate through enough copies to be cold in L2, and row kernels, which take less time than
autograd takes to launch them, are replayed as CUDA graphs. Peak memory: the allocator's counters on
CUDA; on CPU the sum of the profiler's allocation events, which is exact for torch's allocator.
Bytes saved for backward: the distinct storages that autograd packs, inputs left out.
"""

from __future__ import annotations

import datetime
import functools
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cases import CASES, OperationCase, OperationInputs, Provider, Shape
from benchmarks.common import command_line
from benchmarks.provenance import provenance
from fastrepa.commands.bench.peak_memory import highest
from fastrepa.runtime.files import append_lines
from fastrepa.runtime.hardware import cpu_name
from fastrepa_kernels.attention import BACKENDS
from fastrepa_kernels.cost import Ceilings, measure_ceilings

PROVIDERS = ("ours", "eager", "compile", "loop", *BACKENDS)  # of which a case has some
RECORDS = Path(__file__).resolve().parent / "records"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = 11
HEAD_START = 20_000_000
"""GPU cycles, about 11 ms, that the host is ahead of what is timed, as it is in training."""


def environment(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        **provenance(),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": "".join(nvidia_smi("driver_version")) if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def nvidia_smi(*queries: str) -> list[str]:
    """Ask nvidia-smi about the first GPU: a text per query, nothing where it is not here."""
    command = ["nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return []
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return values if done.returncode == 0 and len(values) == len(queries) else []


def _inputs(
    case: OperationCase, shape: Shape, dtype: torch.dtype, device: torch.device
) -> OperationInputs:
    torch.manual_seed(SEED)
    inputs = case.build(shape, dtype, device)
    if case.backward:
        for leaf in inputs.leaves:
            leaf.requires_grad_()
    return inputs


def _once(provider: Provider, inputs: OperationInputs) -> list[Tensor]:
    """Return outputs and gradients."""
    outputs = provider(inputs.leaves, inputs.fixed)
    if not inputs.upstream:
        return [t.detach() for t in outputs]
    upstream = [g.to(y.dtype) for g, y in zip(inputs.upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, inputs.leaves, upstream)
    return [t.detach() for t in (*outputs, *grads)]


def _wide(inputs: OperationInputs) -> OperationInputs:
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs.leaves]
    return OperationInputs(
        leaves, [t.double() for t in inputs.fixed], [g.double() for g in inputs.upstream]
    )


def _errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((v.double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        for v, e in zip(values, exact, strict=True)
    ]


def gate(
    case: OperationCase,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    names: Collection[str] = PROVIDERS,
) -> tuple[dict[str, float], dict[str, str]]:
    """The largest error of eager and of `names` at this shape, and what is wrong with those that
    are: the output or gradient, counted from 0, its error and what was allowed.
    """
    wide = _wide(_inputs(case, shape, dtype, device))
    exact = _once(case.providers["eager"], wide)
    eager_values = _once(case.providers["eager"], _inputs(case, shape, dtype, device))
    eager = _errors(eager_values, exact)
    del wide, eager_values
    errors, wrong = {"eager": max(eager)}, {}
    for name, provider in case.providers.items():
        if name == "eager" or name not in names or case.refusal(name, shape, dtype, device):
            continue
        values = _once(provider, _inputs(case, shape, dtype, device))
        mine = _errors(values, exact)
        errors[name] = max(mine)
        # A scalar may be right to many digits by luck: there a unit of the operands' dtype counts.
        units = [torch.finfo(dtype if v.numel() == 1 else v.dtype).eps for v in values]
        # Ours keeps the rule; a rival is only refused when it computes something else.
        factor = 2 if name == "ours" else 8
        limits = [factor * (e + unit / 2) for e, unit in zip(eager, units, strict=True)]
        off = [
            f"tensor {i}: error {m:.2e}, allowed {limit:.2e}"
            for i, (m, limit) in enumerate(zip(mine, limits, strict=True))
            if not m <= limit
        ]
        if off:
            wrong[name] = "; ".join(off)
    return errors, wrong


def saved_bytes(provider: Provider, inputs: OperationInputs) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, inputs left out."""
    given = {t.untyped_storage().data_ptr() for t in (*inputs.leaves, *inputs.fixed)}
    seen: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(t.detach())  # alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        provider(inputs.leaves, inputs.fixed)
    return sum(seen.values())


def peak_bytes(provider: Provider, inputs: OperationInputs, device: torch.device) -> int:
    """Most bytes alive above the inputs during forward and backward."""
    return highest(lambda: _once(provider, inputs), device)


def _copies(inputs: OperationInputs, device: torch.device) -> list[OperationInputs]:
    """Make enough input sets that none is still in L2 when its turn comes again (CUDA only)."""
    if device.type == "cpu":
        return [inputs]
    size = sum(t.nbytes for t in (*inputs.leaves, *inputs.fixed, *inputs.upstream))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(max(math.ceil(2 * l2 / size), 1), 8)
    copies = [inputs]
    for _ in range(count - 1):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs.leaves]
        fixed = [t.clone() for t in inputs.fixed]
        copies.append(OperationInputs(leaves, fixed, [g.clone() for g in inputs.upstream]))
    return copies


class _Clock:
    """Marks on the device's time line (CUDA events) or the host's."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self, a: int, b: int) -> float:
        if self.on_gpu:
            self.marks[b].synchronize()
            return self.marks[a].elapsed_time(self.marks[b])
        return 1000 * (self.marks[b] - self.marks[a])


@functools.cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures: autograd keeps a leaf's stream for as long as anything holds
    its node, and a capture that meets another one fails.
    """
    return torch.cuda.Stream(device)


def replayed(works: list[Callable[[], object]], device: torch.device) -> list[Callable[[], object]]:
    """Capture each of `works` as a CUDA graph: to be called in this order, they cost the host one
    launch each. On a CPU as they are. A work is called three times first, so that it is compiled;
    what one leaves for the next must be alive when it returns.
    """
    if device.type == "cpu":
        return works
    stream = _capturing(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            for work in works:
                work()
    torch.cuda.current_stream(device).wait_stream(stream)
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for work in works:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            work()
    return [graph.replay for graph in graphs]


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Times of `work`, replayed without a wait between: on CUDA those of its kernels alone."""
    (replay,) = replayed([work], device)
    clock = _Clock(device)
    clock.mark()
    for _ in range(repeats):
        replay()
        clock.mark()
    return [clock.milliseconds(i, i + 1) for i in range(repeats)]


def _halves(provider: Provider, given: OperationInputs) -> list[Callable[[], object]]:
    """The forward pass, and where there is one the backward pass of what it left."""
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.clear()
        outputs.extend(provider(given.leaves, given.fixed))

    def backward() -> None:
        upstream = [g.to(y.dtype) for g, y in zip(given.upstream, outputs, strict=True)]
        torch.autograd.grad(outputs, given.leaves, upstream)
        outputs.clear()

    return [forward, backward] if given.upstream else [forward]


def times(
    case: OperationCase,
    names: list[str],
    inputs: OperationInputs,
    device: torch.device,
    repeats: int,
) -> dict[str, dict[str, list[float]]]:
    """Return provider -> direction -> milliseconds, the providers taking turns."""
    copies = _copies(inputs, device)
    works = {
        name: [
            replayed(halves, device) if case.row_kernels else halves
            for halves in (_halves(case.providers[name], given) for given in copies)
        ]
        for name in names
    }
    clocks: dict[str, list[_Clock]] = {name: [] for name in names}
    for i in range(repeats + 1):  # the first round warms up and compiles
        for name in names:
            if device.type == "cuda":
                torch.cuda._sleep(HEAD_START)
            clock = _Clock(device)
            clock.mark()
            for work in works[name][i % len(copies)]:
                work()
                clock.mark()
            if i:
                clocks[name].append(clock)
    spans = {"forward": (0, 1), "backward": (1, 2), "both": (0, 2)}
    if not case.backward:
        spans = {"forward": (0, 1)}
    return {
        name: {d: [c.milliseconds(*span) for c in clocks[name]] for d, span in spans.items()}
        for name in names
    }


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def spread(values: list[float]) -> dict[str, float]:
    """Return the median of milliseconds, with the quantiles around it, as records have them."""
    return {f"p{q}_ms": quantile(values, q / 100) for q in (20, 50, 80)} | {"n": len(values)}


def measure(
    case: OperationCase,
    shape: Shape,
    dtype_name: str,
    device: torch.device,
    ceilings: Ceilings,
    names: list[str],
    repeats: int,
) -> list[dict[str, Any]]:
    """Gate, then memory, then time: the records of one case at one shape."""
    dtype, on_gpu = DTYPES[dtype_name], device.type == "cuda"
    errors, wrong = gate(case, Shape(shape.model, 2, shape.tokens), dtype, device, names)
    refused = {n: case.refusal(n, shape, dtype, device) for n in names if n in case.providers}
    for name, why in refused.items():
        if why:
            print(f"{case.name} {shape}: {name} left out: {why}")
    for name, why in wrong.items():
        print(f"{case.name} {shape}: {name} is WRONG ({why}); not timed")
    names = [n for n, why in refused.items() if not why and n not in wrong]
    inputs = _inputs(case, shape, dtype, device)
    timed = times(case, names, inputs, device, repeats)  # first, so that compile has compiled
    costs = case.cost(shape, torch.finfo(dtype).bits // 8)
    if "forward" in costs and "backward" in costs:
        costs["both"] = costs["forward"] + costs["backward"]
    records = []
    for name in names:
        peak = peak_bytes(case.providers[name], inputs, device)
        saved = saved_bytes(case.providers[name], inputs) if case.backward else 0
        for direction, values in timed[name].items():
            record: dict[str, Any] = {
                "case": case.name, "provider": name, "direction": direction, "shape": str(shape),
                "dtype": dtype_name, **spread(values),
                "cache": "cold" if on_gpu else "as it falls",
                "launched": "by a graph" if case.row_kernels and on_gpu else "by autograd",
                "peak_bytes": peak, "saved_bytes": saved, "error": errors[name],
                "eager_error": errors["eager"],
            }  # fmt: skip
            if direction in costs:
                floor = 1000 * ceilings.floor_seconds(costs[direction])
                record |= {
                    "flops": costs[direction].flops, "least_bytes": costs[direction].bytes,
                    "floor_ms": floor, "share_of_floor": floor / record["p50_ms"],
                }  # fmt: skip
            records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    head = (
        f"{'case':34} {'shape':18} {'dtype':5} {'provider':9} {'direction':9} {'p50 ms':>10} "
        f"{'p20..p80':>19} {'floor':>6} {'peak MiB':>9} {'saved MiB':>9} {'error':>9}"
    )
    lines = [head]
    for r in records:
        spread = f"{r['p20_ms']:.3f}..{r['p80_ms']:.3f}"
        share = f"{r['share_of_floor']:.0%}" if "share_of_floor" in r else "-"
        lines.append(
            f"{r['case']:34} {r['shape']:18} {r['dtype']:5} {r['provider']:9} "
            f"{r['direction']:9} {r['p50_ms']:10.3f} {spread:>19} {share:>6} "
            f"{r['peak_bytes'] / 2**20:9.1f} {r['saved_bytes'] / 2**20:9.1f} {r['error']:9.1e}"
        )
    return "\n".join(lines)


def append(path: Path, records: list[dict[str, Any]], context: dict[str, Any]) -> None:
    """Append a line a record, on the disk when this returns: what follows may be killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, [record | context for record in records])


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("run", __doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="cuda: bf16, cpu: fp32")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=None, help="cuda: 20, cpu: 3")
    parser.add_argument("--batch", type=int, default=None, help="only shapes of this batch")
    parser.add_argument("--record", type=Path, default=None, help="JSONL to append to; - for none")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    device = torch.device(options.device)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    repeats = options.repeats or (20 if device.type == "cuda" else 3)
    context = environment(device)
    ceilings = measure_ceilings(device, DTYPES[dtype])
    context |= {
        "ceiling_bytes_per_s": ceilings.bytes_per_second,
        "ceiling_flops_per_s": ceilings.flops_per_second,
    }
    everything = []
    for name in options.cases or CASES:
        case = CASES[name]
        for shape in case.shapes(device):
            if options.batch not in (None, shape.batch):
                continue
            records = measure(case, shape, dtype, device, ceilings, options.providers, repeats)
            path = options.record or RECORDS / f"{name}_{device.type}.jsonl"
            if str(path) != "-":
                append(path, records, context)
            everything += records
    print(table(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
