"""Files that are written beside training: tensors copied to host memory, then streamed to disk.

Nothing here holds Python's lock for long: a thread that writes leaves the step alone. That is why
safetensors' own writer, which copies every tensor into Python bytes first, is not used to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 8 << 20  # bytes written and hashed at a time


def is_finite(values: Tensor) -> bool:
    """Tell whether every value of a real tensor [...] is a number: one pass, next to no memory."""
    if not values.is_floating_point():
        return True
    for part in values.reshape(-1).split(CHUNK // 4):
        part = part if part.element_size() >= 4 else part.float()
        # Twelve times as fast as isfinite; a NaN is the least and the greatest.
        if part.numel() and not all(math.isfinite(end) for end in part.aminmax()):
            return False
    return True


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first of real tensors, [...] each, that holds a NaN or an infinity."""
    return next((name for name, values in tensors.items() if not is_finite(values)), None)


class HostTensors:
    """Named float32 tensors side by side in one piece of host memory, pinned on a GPU's behalf.

    `put` copies one [...] in without waiting for a GPU; `file_chunks` is the whole as a safetensors
    file. Torch rounds pinned memory up to a power of two.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, pin: bool) -> None:
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        # Written once, so that no page is missing when the first save is waiting.
        self.memory = torch.empty(sum(sizes.values()), pin_memory=pin).fill_(0)
        parts = self.memory.split(list(sizes.values()))
        self.views = {n: p.view(shapes[n]) for n, p in zip(sizes, parts, strict=True)}

    def put(self, name: str, value: Tensor) -> None:
        self.views[name].copy_(value, non_blocking=True)

    def not_finite(self) -> str | None:
        """Name a tensor that holds a NaN or an infinity."""
        return None if is_finite(self.memory) else first_not_finite(self.views)

    def file_chunks(self) -> Iterator[memoryview | bytes]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, view in self.views.items():
            begin, end = end, end + 4 * view.numel()
            header[name] = {"dtype": "F32", "shape": list(view.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        if self.memory.numel():  # nothing has no view
            yield memoryview(self.memory.numpy().view("uint8"))  # type: ignore[arg-type]


def write_durably(
    path: Path, chunks: Iterable[memoryview | bytes], seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Write, hash and fsync a new file; returns its {bytes, sha256}, of what was meant to be there.

    Adds what each part took to `seconds` (write, sha256, fsync). Raises OSError.
    """
    seconds = {} if seconds is None else seconds
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as f:
        for chunk in chunks:
            for first in range(0, len(chunk), CHUNK):
                piece = memoryview(chunk)[first : first + CHUNK]
                size += len(piece)
                with timed(seconds, "sha256"):
                    digest.update(piece)
                with timed(seconds, "write"):
                    while len(piece):  # a nearly full disk takes a part, and then says so
                        piece = piece[f.write(piece) :]
        with timed(seconds, "fsync"):
            os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` in a thread that does not keep a dying process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # handed to whoever asks for the result
            future.set_exception(e)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


class timed:
    """Adds the time spent inside to seconds[part]."""

    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds, self.part = seconds, part

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.began
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + spent
