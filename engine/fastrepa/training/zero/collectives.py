"""DeepSpeed's collectives, metered."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm as deepspeed_comm

Region = Callable[[str], contextlib.AbstractContextManager[None]]
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
    "all_to_all_single", "all_to_all", "gather", "scatter", "barrier",
)  # fmt: skip


def time_collectives(region: Region) -> None:
    """Make DeepSpeed's collectives of this process, and its waiting for them, happen inside
    `region("communication")`: a bound method, whose object is not kept alive.
    """
    backend = deepspeed_comm.cdb
    if not isinstance(backend, _TimedBackend):
        backend = deepspeed_comm.cdb = _TimedBackend(backend)
    backend.region = weakref.WeakMethod(region)


class _TimedBackend:
    """Stands before DeepSpeed's communication backend, the one object that it calls."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.region: Callable[[], Region | None] = lambda: None

    def communication(self) -> contextlib.AbstractContextManager[None]:
        region = self.region()
        return contextlib.nullcontext() if region is None else region("communication")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backend, name)
        if name not in COLLECTIVES:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.communication():
                work = found(*args, **kwargs)
            return _TimedWork(self, work) if hasattr(work, "wait") else work

        return timed


class _TimedWork:
    """A collective that was started: waiting for it is communication too."""

    def __init__(self, backend: _TimedBackend, work: Any) -> None:
        self.backend, self.work = backend, work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self.backend.communication():
            return self.work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)
