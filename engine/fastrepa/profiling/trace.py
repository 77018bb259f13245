"""A torch.profiler trace of training steps as operations with their costs, and the idle gaps.

Steps, regions and parts of the generator are annotations in the trace. An operation is what the
profiler shows by the name of something that OperationCosts counted, with all that it calls. On the
CPU its time is its own; on a GPU that of the kernels it launched, in the region it was launched in.
What torch.compile compiled is a part of its own, without a cost: other calls were counted than run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent

from fastrepa.profiling.operation_costs import NOTHING, Counted
from fastrepa.runtime.regions import OTHER
from fastrepa_kernels.cost import Cost

REGION, PART, STEP = "region/", "part/", "profiled step"
GRAPH = "## Call CompiledFxGraph"  # how Inductor names a call of what it compiled
COMPILED = "compiled"
GAP = 20e-6  # seconds; shorter ones are the time between two operations


@dataclass(frozen=True)
class Operation:
    """One operation in one region and part of the generator ('' outside it): per step its calls
    and seconds, what it cost and, on a GPU, its kernels' seconds.
    """

    name: str
    region: str
    part: str
    calls: float
    seconds: float
    cost: Cost
    kernels: dict[str, float]


@dataclass(frozen=True)
class Gap:
    """Time in which nothing ran: no operation on the CPU, no kernel on a GPU. Seconds and number
    per step; what ran before and after, and the region the host was in.
    """

    region: str
    after: str
    before: str
    count: float
    seconds: float


@dataclass(frozen=True)
class Trace:
    """A step's operations and gaps, the longest first; seconds, slowed down by the profiler;
    busy_seconds: of these, while anything ran.
    """

    operations: list[Operation]
    gaps: list[Gap]
    seconds: float
    busy_seconds: float


def read_trace(
    events: Sequence[FunctionEvent],
    counted: Mapping[tuple[str, str, str], Counted],
    *,
    on_gpu: bool,
) -> Trace:
    """The steps among `events`; counted: what `OperationCosts` saw in one of them."""
    host = [e for e in events if not on_device(e)]
    windows = step_windows(host)
    region_at = regions(host)
    wanted = {name: name for name, _, _ in counted}
    # torch calls some operations of one tensor so directly that only their autograd shows.
    wanted |= {f"GeneratedBackwardFor_{n.replace('::', '_')}_default": n for n in wanted}
    part_of: dict[int, str] = {}  # by autograd's sequence numbers
    for e in host:
        if e.sequence_nr >= 0 and not e.name.startswith("autograd::"):
            part = _enclosing(e, PART)
            if part:
                part_of.setdefault(e.sequence_nr, part)

    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str, str], int] = defaultdict(int)
    kernels: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    key_of: dict[int, tuple[str, str, str]] = {}
    for e in host:
        if _annotation(e) or not inside(windows, e):
            continue
        chain = [e, *_ancestors(e)]
        if e.name.startswith(GRAPH) and not on_gpu:  # less the operations that it calls
            graph = f"passes, {COMPILED}", region_at(e.time_range.start), COMPILED
            calls[graph] += 1
            seconds[graph] += (
                e.time_range.elapsed_us() - sum(c.time_range.elapsed_us() for c in e.cpu_children)
            ) / 1e6
            continue
        # The outermost of the operations that were counted holds the others.
        found = [a for a in chain if a.name in wanted]
        if not found and not e.kernels:
            continue
        op = found[-1] if found else chain[0]
        key = key_of.get(op.id)
        if key is None:
            region = region_at(op.time_range.start)
            part = _enclosing(op, PART)
            if not part and region == "backward":
                numbers = (a.sequence_nr for a in _ancestors(op) if a.sequence_nr >= 0)
                part = part_of.get(next(numbers, -1), "")
            name = wanted.get(op.name, op.name)
            if any(a.name.startswith(GRAPH) for a in _ancestors(op)):
                name, part = f"{name}, {COMPILED}", COMPILED
            key = key_of[op.id] = name, region, part
            calls[key] += 1
            if not on_gpu:
                seconds[key] += op.time_range.elapsed_us() / 1e6
        for kernel in e.kernels:
            seconds[key] += kernel.duration / 1e6
            kernels[key][kernel.name] += kernel.duration / 1e6

    steps = len(windows)
    gaps, busy = idle_gaps(windows, what_ran(events, windows, on_gpu=on_gpu), region_at)
    return Trace(
        operations=[
            Operation(
                *key,
                calls=calls[key] / steps,
                seconds=spent / steps,
                cost=counted[key].cost if key in counted else NOTHING,
                kernels={k: s / steps for k, s in kernels[key].items()},
            )
            for key, spent in sorted(seconds.items(), key=lambda item: -item[1])
        ],
        gaps=gaps,
        seconds=sum(end - start for start, end in windows) / 1e6 / steps,
        busy_seconds=busy,
    )


Span = tuple[float, float, str]  # start and end in microseconds, name


def step_windows(events: Iterable[FunctionEvent]) -> list[tuple[float, float]]:
    """Start and end of every annotated step, in order."""
    return sorted((e.time_range.start, e.time_range.end) for e in events if e.name == STEP)


def inside(windows: Sequence[tuple[float, float]], e: FunctionEvent) -> bool:
    """Tell whether an event began in one of the steps."""
    at = bisect_right(windows, e.time_range.start, key=lambda window: window[0]) - 1
    return at >= 0 and e.time_range.start < windows[at][1]


def what_ran(
    events: Iterable[FunctionEvent], windows: Sequence[tuple[float, float]], *, on_gpu: bool
) -> list[Span]:
    """List what kept the device busy in the steps, by start: kernels and copies on a GPU, on the
    CPU the operations that no other called.
    """

    def counts(e: FunctionEvent) -> bool:
        if on_device(e) != on_gpu or _annotation(e) or not inside(windows, e):
            return False
        return on_gpu or all(_annotation(a) for a in _ancestors(e))

    return sorted((e.time_range.start, e.time_range.end, e.name) for e in events if counts(e))


def on_device(e: FunctionEvent) -> bool:
    """Tell whether an event is of the GPU, not of the host."""
    return e.device_type != torch.autograd.DeviceType.CPU


def _annotation(e: FunctionEvent) -> bool:
    """Tell whether it is an annotation: on a GPU they come again, as spans of the stream."""
    return e.is_user_annotation or e.name.startswith((REGION, PART, STEP))


def _ancestors(e: FunctionEvent) -> list[FunctionEvent]:
    out = []
    parent = e.cpu_parent
    while parent is not None:
        out.append(parent)
        parent = parent.cpu_parent
    return out


def _enclosing(e: FunctionEvent, prefix: str) -> str:
    """The innermost annotation around an event, without its prefix."""
    for a in _ancestors(e):
        if a.name.startswith(prefix):
            return a.name.removeprefix(prefix)
    return ""


def regions(host: Iterable[FunctionEvent]) -> Callable[[float], str]:
    """The innermost region at a time, whatever thread asks: autograd has one of its own."""
    marks: list[tuple[float, int, str]] = []
    for e in host:
        if not e.name.startswith(REGION):
            continue
        name = e.name.removeprefix(REGION)
        marks += [(e.time_range.start, 1, name), (e.time_range.end, 0, name)]
    marks.sort(key=lambda m: (m[0], m[1]))
    times, names, stack = [], [], []
    for time, opens, name in marks:
        if opens:
            stack.append(name)
        elif name in stack:
            del stack[len(stack) - 1 - stack[::-1].index(name)]
        times.append(time)
        names.append(stack[-1] if stack else OTHER)

    def at(time: float) -> str:
        i = bisect_right(times, time) - 1
        return names[i] if i >= 0 else OTHER

    return at


def idle_gaps(
    windows: Sequence[tuple[float, float]],
    running: Sequence[Span],
    region_at: Callable[[float], str],
) -> tuple[list[Gap], float]:
    """Return (gaps, the longest together first; seconds in which anything ran), per window."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    idle, at = 0.0, 0
    for start, end in windows:
        reached, after = start, "the step's start"
        while at < len(running) and running[at][0] < end:
            begins, ends, name = running[at]
            if begins > reached:
                idle += begins - reached
                if begins - reached > GAP * 1e6:
                    # The region where the wait was longest is the one at its middle.
                    region = region_at((begins + reached) / 2)
                    found[region, after, name].append(begins - reached)
            if ends > reached:
                reached, after = ends, name
            at += 1
        if end > reached:
            idle += end - reached
            if end - reached > GAP * 1e6:
                found[region_at((end + reached) / 2), after, "the step's end"].append(end - reached)
    steps, total = len(windows), sum(end - start for start, end in windows)
    gaps = [
        Gap(*key, count=len(times) / steps, seconds=sum(times) / 1e6 / steps)
        for key, times in found.items()
    ]
    return sorted(gaps, key=lambda g: -g.seconds), (total - idle) / 1e6 / steps
