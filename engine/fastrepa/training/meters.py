"""Measures of a run between two log lines: rates, shares of time, peak memory.

Time is cut at marks. Whoever enters or leaves a region sets one, and the time up to the next mark
belongs to the innermost open region, so shares add up to one and nothing is counted twice. On the
CPU a mark is a reading of the clock. On a GPU it is an event in the compute stream: a share is the
time that this stream spent there, at work or idle, and what runs beside it (reading ahead, a
collective on a stream of its own) counts only where the stream waited. Events are read when the
device has passed them; between log lines the host never waits for them.

Communication is what can be told apart from outside DeepSpeed: its collectives and ours, and
waiting for those that were started earlier. Where they share the compute stream that is all of
the communication; where DeepSpeed overlaps it with the backward pass (a stream of its own) it is
the part that was waited for. A slower rank shows up here on the others.

MFU (Chowdhery et al. 2022) is of model FLOPs (model/flops.py): no recomputation, no optimiser, no
encoder. `frozen_flops_per_s` is the encoders' and the codec's forward beside it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.config import Config
from fastrepa.model.flops import model_flops
from fastrepa.runtime.hardware import peak_flops
from fastrepa.runtime.regions import NAMES, OTHER, SAMPLING
from fastrepa.runtime.world import World
from fastrepa.training.memory.frozen import frozen_flops
from fastrepa.vision.codec import codec_shape
from fastrepa.vision.features import plan_encoder


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs per image: of the generator's forward and backward, and of the forwards of encoders and
    codec; and the device's peak in FLOP/s, None where nobody has measured or printed it.
    """

    training: int
    frozen: int
    peak: float | None


def image_flops(config: Config, device: torch.device, *, cached_latents: bool) -> ImageFlops:
    """Count an image of a run of `config`. A GPU's peak is its datasheet's."""
    channels, side = codec_shape(config.data.codec, config.data.resolution)
    plans = [plan_encoder(e, resolution=config.data.resolution) for e in config.vision.encoders]
    widths = [p.width for p in plans]
    flops = model_flops(
        config.model, config.alignment, side=side, channels=channels, encoder_widths=widths
    )
    frozen = frozen_flops(config.data, config.vision, plans, cached_latents=cached_latents)
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_flops(name, bf16=config.training.bf16)
    return ImageFlops(flops.training, frozen, peak)


class _Region:
    """An open-and-close pair of marks; one object per name, opened as often as one likes."""

    __slots__ = ("meter", "name")

    def __init__(self, meter: Meter, name: str) -> None:
        self.meter, self.name = meter, name

    def __enter__(self) -> None:
        self.meter._open(self.name)

    def __exit__(self, *_: object) -> None:
        self.meter._close()


class Meter:
    """Sums metrics and times regions between two log lines without waiting for the device.

    `seconds` holds every region's time since the last reading, as far as the device has come.
    """

    def __init__(self, world: World, global_batch: int, flops: ImageFlops | None = None) -> None:
        self.world, self.global_batch, self.flops = world, global_batch, flops
        self._on_gpu = world.device.type == "cuda"
        self._regions = {name: _Region(self, name) for name in (*NAMES, SAMPLING)}
        self._stack: list[str] = []
        self._marks: deque[tuple[Any, str]] = deque()  # on a GPU: (event, whose time begins)
        self._pool: list[Any] = []
        self._stream = torch.cuda.current_stream(world.device) if self._on_gpu else None
        self.reset()

    def reset(self) -> None:
        """Begin a new reading now."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.seconds = dict.fromkeys((*NAMES, SAMPLING), 0.0)
        current = self._stack[-1] if self._stack else OTHER
        self._now = current
        if self._on_gpu:
            self._pool.extend(event for event, _ in self._marks)
            self._marks.clear()
            torch.cuda.reset_peak_memory_stats(self.world.device)
            self._mark(current)
        else:
            self._since = time.perf_counter()

    def region(self, name: str) -> AbstractContextManager[None]:
        """Time inside is `name`'s (of NAMES or SAMPLING), less that of regions opened inside."""
        return self._regions[name]

    def _open(self, name: str) -> None:
        self._stack.append(name)
        self._mark(name)

    def _close(self) -> None:
        self._stack.pop()
        self._mark(self._stack[-1] if self._stack else OTHER)

    def _mark(self, name: str) -> None:
        if not self._on_gpu:
            now = time.perf_counter()
            self.seconds[self._now] += now - self._since
            self._now, self._since = name, now
            return
        if torch.cuda.current_stream(self.world.device) != self._stream:
            return  # beside the compute stream, whose time goes on
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((event, name))

    def _collect(self) -> None:
        """Take in the marks that the device has passed; never waits."""
        while len(self._marks) > 1 and self._marks[1][0].query():
            event, name = self._marks.popleft()
            self.seconds[name] += event.elapsed_time(self._marks[0][0]) / 1000
            self._pool.append(event)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add a step's means [] of this rank, on the device; `skipped`: 1 where it was left out."""
        self.steps += 1
        skipped = metrics["skipped"]
        for name, value in metrics.items():
            if name != "skipped":  # what a skipped step lost says nothing
                value = torch.where(skipped > 0, 0.0, value.float())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self._collect()

    def read(self, step: int, lr: float, norm: float | Tensor) -> dict[str, float]:
        """The log line of the steps since the last reading: means over steps and ranks, per-device
        rates, peak_memory_bytes of the fullest rank (collective; waits for the device).

        norm: a number or []. peak_memory_bytes: of torch's allocator since the last line; on the
        CPU the process's largest resident set so far.
        """
        self._mark(self._stack[-1] if self._stack else OTHER)
        if self._marks:
            self._marks[-1][0].synchronize()
            self._collect()
        total = max(sum(self.seconds[name] for name in NAMES), 1e-9)
        shares = [self.seconds[name] / total for name in NAMES]
        taken = self.steps - self.sums.pop("skipped")
        names = [*self.sums, *NAMES]
        means = torch.stack([value.float() for value in self.sums.values()]) / taken
        means = torch.cat([means, torch.tensor(shares, device=means.device)])
        peak = torch.tensor([float(self._peak_memory())], device=means.device, dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(means)
            means /= self.world.size
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        values = dict(zip(names, means.tolist(), strict=True))
        losses = {name: values[name] for name in self.sums}
        rate = self.steps * self.global_batch / total
        out = {
            "step": step,
            **losses,
            "grad_norm": float(norm),
            "lr": lr,
            "images_per_s": rate,
            "step_seconds": total / self.steps,
            **self._utilisation(rate / self.world.size),
            **{name: values[name] for name in NAMES},
            "peak_memory_bytes": peak.item(),
        }
        self.reset()
        return out

    def _utilisation(self, images_per_s: float) -> dict[str, float]:
        """Return the MFU of one device, at its share of the images."""
        f = self.flops
        if f is None:
            return {}
        out = {"model_flops_per_s": f.training * images_per_s}
        if f.peak:
            out["mfu"] = f.training * images_per_s / f.peak
        if f.frozen:
            out["frozen_flops_per_s"] = f.frozen * images_per_s
        return out

    def _peak_memory(self) -> int:
        if self._on_gpu:
            return int(torch.cuda.max_memory_allocated(self.world.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
