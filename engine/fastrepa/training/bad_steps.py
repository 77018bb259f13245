"""Steps whose loss or gradients are not finite: skipped on every rank alike, and counted.

A step is bad where any rank's loss, or the gradients' global norm, is NaN or infinite. AdamWEMA (or
DeepSpeed before it) then leaves weights, optimiser states and EMA as they were. All ranks know
alike: the loss flag is all-reduced on the device, the norm is global. The host reads the count only
when the device has it ready, so a healthy run waits for nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.runtime.world import World
from fastrepa.training.optimizer import bad_norm

LINES = 50  # logged losses that a spike is compared with
FEWEST = 10  # of them, before there is a verdict


class BadSteps:
    """Knows whether the step under way is bad, and how many in a row were."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._loss = torch.zeros((), dtype=torch.bool, device=world.device)
        self._in_row = torch.zeros((), dtype=torch.float32, device=world.device)
        self._host = torch.zeros((), pin_memory=world.device.type == "cuda")
        self._copied: Any = None
        self._seen = 0

    def add(self, loss: Tensor) -> None:
        """Take note of a micro-batch's loss [] on this rank."""
        self._loss = self._loss | ~loss.detach().isfinite()

    def agree(self) -> Tensor:
        """Tell if any rank's loss of this step is not finite: bool [] on the device; collective."""
        flag = self._loss.float()
        if self.world.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._loss = flag > 0
        return self._loss

    def taken(self, norm: Tensor | float) -> Tensor:
        """End the step, with this global gradient norm; tell if it was skipped: [], 0 or 1."""
        bad = (self._loss | bad_norm(norm).to(self.world.device)).float()
        self._loss = torch.zeros_like(self._loss)
        self._in_row = (self._in_row + 1) * bad
        if self._copied is None or self._copied.query():
            self._seen = int(self._host)
            self._host.copy_(self._in_row, non_blocking=True)
            if self.world.device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record()
            else:
                self._seen = int(self._host)
        return bad

    @property
    def seen(self) -> int:
        """Bad steps in a row, as far as the host knows without waiting: a step or two late."""
        return self._seen

    @property
    def count(self) -> Tensor:
        """Bad steps in a row up to the last step: float32 [] on the device."""
        return self._in_row

    def in_row(self) -> int:
        """Bad steps in a row up to the last step; waits for the device."""
        return int(self._in_row)


class Spikes:
    """Warns of a logged loss far above those before it, in units of their standard deviation."""

    def __init__(self, threshold: float, earlier: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self._losses = deque((x for x in earlier if math.isfinite(x)), maxlen=LINES)

    def check(self, step: int, loss: float) -> str | None:
        """A warning, or None; a spike does not count as normal for the lines after it."""
        losses = list(self._losses)
        if not math.isfinite(loss):
            return None
        if self.threshold and len(losses) >= FEWEST:
            mean = sum(losses) / len(losses)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
            if loss > mean + self.threshold * deviation and loss > mean:
                away = f"{(loss - mean) / deviation:.0f} deviations" if deviation else "well"
                return (
                    f"loss spike at step {step}: {loss:.4g}, {away} above the {mean:.4g} of the "
                    f"{len(losses)} lines before it (survival.loss_spike {self.threshold:g})"
                )
        self._losses.append(loss)
        return None
