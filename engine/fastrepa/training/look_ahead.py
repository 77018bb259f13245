"""The next batch's targets, made while this batch's backward runs, so that nobody waits for the
frozen encoder and it waits for nobody.

On a GPU its kernels go to a stream of their own. A batch is drawn, and its copies are queued, on
the compute stream, between forward and backward: the side stream begins where the forward ends, and
what is left of it when the next forward comes is waited for there (and metered as `encoder`). Every
value is computed once, from the same inputs by the same kernels, so a run's bits do not change.
On a CPU there is one stream: the order of the work differs, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrepa.data.pipeline import Batch
from fastrepa.training.targets import Targets

Region = Callable[[str], AbstractContextManager[None]]


class Batches(Protocol):
    """A stream of micro-batches that starts at the run's step; a run's own never ends."""

    def __next__(self) -> Batch: ...


@dataclass
class _Begun:
    source: Batches
    batch: Batch
    targets: list[Tensor]
    done: Any
    """On a GPU an event of the side stream."""


class LookAhead:
    """Makes targets at most one micro-batch ahead of the trainer.

    wanted: `vision.look_ahead`. active: what came of it.
    """

    def __init__(self, targets: Targets, wanted: bool | str, device: torch.device) -> None:
        self.targets = targets
        on_gpu = device.type == "cuda"
        self.active = bool(targets.encoders) and (
            on_gpu and targets.need_images if wanted == "auto" else bool(wanted)
        )
        self._side = torch.cuda.Stream(device) if on_gpu and self.active else None
        self._begun: _Begun | None = None

    def begin(self, batches: Batches, region: Region) -> None:
        """Start on the next batch, if there is one: to be called between forward and backward."""
        if not self.active:
            return
        with region("data_wait"):
            batch = next(batches, None)
        if batch is None:
            return
        if self._side is None:
            with region("encoder"):
                self._begun = _Begun(batches, batch, self.targets(batch), None)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side), region("encoder"):
            self._begun = _Begun(batches, batch, self.targets(batch), self._side.record_event())

    def take(self, batches: Batches, region: Region) -> tuple[Batch, list[Tensor] | None]:
        """Return (the batch that was begun, its targets [B,T,Z]), or (the next batch, None)."""
        begun, self._begun = self._begun, None
        if self._side is not None and begun is not None:
            with region("encoder"):
                compute = torch.cuda.current_stream(self._side.device)
                compute.wait_event(begun.done)
            for tensor in begun.targets:
                tensor.record_stream(compute)  # its memory is the side stream's
        if begun is None or begun.source is not batches:
            with region("data_wait"):
                return next(batches), None
        return begun.batch, begun.targets
