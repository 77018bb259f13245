"""The highest moment of memory, counted exactly where torch's allocator can tell."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile


def storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Every live tensor's storage on the device, by address; gradients included."""
    gc.collect()
    out = {}
    for item in gc.get_objects():
        # What torch.compile traced with is a tensor without memory.
        if issubclass(type(item), torch.Tensor) and not issubclass(type(item), FakeTensor):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None and tensor.device.type == device.type:
                    storage = tensor.untyped_storage()
                    try:
                        out[storage.data_ptr()] = storage
                    except RuntimeError:  # another kind that has none
                        continue
    return out


def highest(work: Callable[[], object], device: torch.device) -> int:
    """Bytes above what was held before, at the highest moment of `work()`.

    On a GPU the caching allocator's own count; on the CPU the sum of the profiler's allocation
    events, the temporaries inside operations included. What libraries allocate by themselves
    (oneDNN's scratch, NCCL's buffers) is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    result = profiled.profiler.kineto_results
    events = [e for e in result.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
