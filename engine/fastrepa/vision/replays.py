"""`vision.compile: graphs`: a frozen encoder's forward, recorded once and replayed as a CUDA graph.

An encoder's hundreds of small kernels are then one launch, so that the host, which feeds the
generator too, is never what the GPU waits for. Graph and pool are the encoder's own: it replays on
a side stream while the generator runs (training/look_ahead.py), and Inductor's own CUDA graphs
share one pool, which allows no two at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # calls before a recording: what is compiled, chosen or allocated once is so by then


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    made: Tensor


class Replays:
    """Replays `work`, a function of one CUDA tensor: one recording for each shape and layout.

    What is returned is the caller's own, on the stream that is current. Calls must not overlap.
    """

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        self.work = work
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = (x.shape, x.stride(), x.dtype)
        if key not in self._recordings:
            self._recordings[key] = self._record(x)
        recording = self._recordings[key]
        recording.given.copy_(x)
        recording.graph.replay()
        return recording.made.clone()

    def _record(self, x: Tensor) -> _Recording:
        current, side = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            given = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            given.copy_(x)
            for _ in range(WARM_UP):
                self.work(given)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's threads allocate while this one records.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            made = self.work(given)
        return _Recording(graph, given, made)
