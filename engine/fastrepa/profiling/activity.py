"""A few steps under torch.profiler as one JSON: kernels by name, idle gaps, and the host's calls.

On a CPU operations take the place of kernels. Steps follow each other as in a run, without a wait
between them; the profiler slows the host down, so gaps are at least as long as a run's.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from fastrepa.profiling.trace import (
    REGION,
    STEP,
    idle_gaps,
    inside,
    on_device,
    regions,
    step_windows,
    what_ran,
)
from fastrepa.runtime.regions import OTHER
from fastrepa.training.meters import Meter

PROFILED = 2  # steps
MOST = 40  # names, and gaps, that are listed
WAIT = "wait for the end"
_RUNTIME = re.compile("(cu|cuda|hip)[A-Z]")  # names of a GPU runtime's calls


class Annotating(Meter):
    """A meter whose regions are named in the profiler's trace too."""

    current = OTHER

    def region(self, name: str) -> AbstractContextManager[None]:
        return self._both(name)

    @contextmanager
    def _both(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            with record_function(REGION + name), self._regions[name]:
                yield
        finally:
            self.current = before


def profiler(device: torch.device) -> Any:
    """Make torch.profiler of the host and, where that is a GPU, of `device`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks on stderr
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def profile_steps(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Trace PROFILED calls of `step`, after one under the profiler, whose first is slow; see
    `summary`.
    """
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    with profiler(device) as profiled:
        step()
        wait()
        with record_function(STEP):
            for _ in range(PROFILED):
                step()
            with record_function(REGION + WAIT):
                wait()
    return summary(list(profiled.events() or []), PROFILED, on_gpu=on_gpu)


def summary(events: Sequence[FunctionEvent], steps: int, *, on_gpu: bool) -> dict[str, Any]:
    """A trace whose one annotated stretch holds `steps` steps, as JSON. Per step:

    seconds; busy_seconds, while anything ran; launches of kernels and copies (or operations);
    `names` of the MOST that ran longest (count, us, share of all that ran); idle_us, and the MOST
    longest `gaps` over 20 us (region the host was in, after, before, count, us); `host_calls` of
    the GPU's runtime (name, count, us). Streams overlap: what ran can exceed the step.
    """
    host = [e for e in events if not on_device(e)]
    windows, region_at = step_windows(host), regions(host)
    spans = what_ran(events, windows, on_gpu=on_gpu)
    gaps, busy = idle_gaps(windows, spans, region_at)
    calls = [
        (e.name, e.time_range.elapsed_us())
        for e in host
        if _RUNTIME.match(e.name)
        and inside(windows, e)
        and region_at(e.time_range.start) != WAIT  # not a step's own
    ]
    names = _by_name([(name, end - start) for start, end, name in spans], steps)
    total = sum(name["us"] for name in names) or 1.0
    seconds = sum(end - start for start, end in windows) / 1e6
    return {
        "of": "kernels" if on_gpu else "operations",
        "steps": steps,
        "seconds": seconds / steps,
        "busy_seconds": busy / steps,
        "launches": len(spans) / steps,
        "names": [name | {"share": name["us"] / total} for name in names[:MOST]],
        "idle_us": (seconds - busy) * 1e6 / steps,
        "gaps": [
            {
                "region": gap.region,
                "after": gap.after,
                "before": gap.before,
                "count": gap.count / steps,
                "us": gap.seconds * 1e6 / steps,
            }
            for gap in gaps[:MOST]
        ],
        "host_calls": _by_name(calls, steps),
    }


def _by_name(items: Sequence[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Return name, count and us per step of (name, us), the longest together first."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, us in items:
        found[name].append(us)
    each = [
        {"name": name, "count": len(times) / steps, "us": sum(times) / steps}
        for name, times in found.items()
    ]
    return sorted(each, key=lambda item: -item["us"])
