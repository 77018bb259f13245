"""Whole tensors out of every rank's fragments, put together beside training.

ZeRO leaves each rank a fragment of a tensor: all or nothing of most in stages 1 and 2, an equal
slice of each in stage 3. At a save a rank copies its own fragments to host memory and asks nobody,
which is all that the step waits for; a thread then sends them, over a gloo group of its own, to the
ranks that write the whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.host_tensors import HostTensors
from fastrepa.checkpoint.kinds import WEIGHT, Whole
from fastrepa.runtime.world import World

WAIT = timedelta(minutes=30)  # for another rank's fragments; its loss is noticed long before


class Fragments:
    """Knows which rank holds what of every tensor, and which writes it (collective to make).

    `mine` are the tensors that this rank writes. Beside their memory it holds in host memory what
    it sends: at most its own partition again.
    """

    def __init__(
        self, whole: Whole, shapes: Mapping[str, tuple[int, ...]], world: World, group: Any
    ) -> None:
        self.whole = whole
        held = {}
        for name in whole.params:
            start, values = whole.local(name, WEIGHT)
            held[name] = (start, values.numel())
        whole.release()
        layout: list[Any] = [None] * world.size
        dist.all_gather_object(layout, held, group=group)
        sizes = [{name: count for name, (_, count) in of.items()} for of in layout]
        self.mine = shares(shapes, world.size, sizes)[world.rank]
        writer = {n: r for r, ns in enumerate(shares(shapes, world.size, sizes)) for n in ns}
        self._number = {name: i for i, name in enumerate(shapes)}
        self._sent: list[tuple[str, int, int, int]] = []  # name, to, where it is staged, elements
        self._received: list[tuple[str, int, int, int]] = []  # name, from, start, elements
        staged = 0
        for name, shape in shapes.items():
            to = writer[name]
            if sizes[to][name] == torch.Size(shape).numel():
                continue  # its writer has all of it
            for rank, of in enumerate(layout):
                start, count = of[name]
                if not count or rank == to:
                    continue
                if rank == world.rank:
                    self._sent.append((name, to, staged, count))
                    staged += count
                elif to == world.rank:
                    self._received.append((name, rank, start, count))
        pin = world.device.type == "cuda"
        self._staged = {k: torch.empty(staged, pin_memory=pin).fill_(0) for k in whole.kinds}
        self._place = {name: (at, count) for name, _, at, count in self._sent}
        self._group: Any = dist.new_group(backend="gloo", timeout=WAIT)

    def copy(self, host: Mapping[str, HostTensors]) -> None:
        """Copy this rank's fragments to host memory, without waiting for a GPU or another rank."""
        for kind, tensors in host.items():
            for name in self.whole.params:
                start, values = self.whole.local(name, kind)
                if name in tensors.views:
                    target = tensors.views[name].view(-1)[start : start + values.numel()]
                elif name in self._place:
                    at, count = self._place[name]
                    target = self._staged[kind][at : at + count]
                else:
                    continue
                target.copy_(values, non_blocking=True)
        self.whole.release()

    def exchange(self, host: Mapping[str, HostTensors]) -> None:
        """Fetch the rest of the tensors in `host`: in a thread, once the copies are there."""
        for i, kind in enumerate(host):
            works: list[Any] = []
            for name, source, start, count in self._received:
                target = host[kind].views[name].view(-1)[start : start + count]
                works.append(dist.irecv(target, source, self._group, self._tag(name, i)))
            for name, to, at, count in self._sent:
                values: Tensor = self._staged[kind][at : at + count]
                works.append(dist.isend(values, to, self._group, self._tag(name, i)))
            for work in works:
                work.wait()

    def _tag(self, name: str, kind: int) -> int:
        return self._number[name] + kind * len(self._number)


def shares(
    shapes: Mapping[str, tuple[int, ...]],
    size: int,
    held: Sequence[Mapping[str, int]] | None = None,
) -> list[list[str]]:
    """Names for each of `size` writers: the largest tensors first, each to the writer that has
    least so far, among those that hold most of it (`held`: elements by rank and name).
    """
    order = {name: i for i, name in enumerate(shapes)}
    loads, out = [0] * size, [[] for _ in range(size)]  # type: list[int], list[list[str]]
    for name in sorted(shapes, key=lambda n: (-torch.Size(shapes[n]).numel(), order[n])):
        ranks = range(size)
        if held is not None:
            most = max(of[name] for of in held)
            ranks = [r for r in ranks if held[r][name] == most]  # type: ignore[assignment]
        least = min(ranks, key=loads.__getitem__)
        loads[least] += torch.Size(shapes[name]).numel()
        out[least].append(name)
    return [sorted(names, key=order.__getitem__) for names in out]
