"""Finds where the host reads a tensor's value, which on a GPU waits for all work before it.

torch.cuda.set_sync_debug_mode finds these on a GPU. `HostSyncs` finds them anywhere: it sees the
methods that read (`item`, `tolist`, `cpu`, `numpy`, `bool()`, ...), also where C++ calls them, and
operations whose result's shape depends on values. On a CPU-only machine every tensor is in host
memory, so code that is reached there alone, or that reads a host copy on purpose, is known by
place (`IN_HOST_MEMORY`), each with the reason why it does not wait on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__",
)  # fmt: skip
READING_OPS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2",
        "unique_dim", "unique_consecutive", "repeat_interleave", "bincount",
    )
}  # fmt: skip
IN_HOST_MEMORY = {
    ("fastrepa/training/optimizer.py", "update"): "only where the flag is a CPU tensor",
    ("fastrepa/training/optimizer.py", "_fused_update"): "only where the count is a CPU tensor",
    ("fastrepa/data/pipeline.py", "_empty"): "memory of the host, which reads go into",
    ("fastrepa/training/bad_steps.py", "taken"): "a pinned copy, once its event has passed",
}
"""(file, function) -> why reading there waits for no GPU."""


@dataclass(frozen=True)
class HostSync:
    """A place that reads values: what by (`item`, `bool`, an operation), file:line and function of
    the innermost frame outside torch, that of our innermost frame, and the region it happened in.
    """

    what: str
    file: str
    line: int
    function: str
    through: str
    region: str

    @property
    def reason(self) -> str | None:
        """The reason why this one waits for no GPU; None where it would."""
        return IN_HOST_MEMORY.get((self.file, self.function))

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


class HostSyncs(TorchDispatchMode):
    """Counts every place that reads values, in `found`, while entered.

    region: tells the name of what is being done. Tensors that are not on `device` are in host
    memory already and do not count.
    """

    def __init__(self, device: torch.device, region: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self.device, self.region = device, region
        self.found: Counter[HostSync] = Counter()
        self._inside = False
        self._methods: dict[str, Any] = {}

    @property
    def waiting(self) -> list[tuple[HostSync, int]]:
        """The places that wait for a GPU, with how often, the most frequent first."""
        return [(s, n) for s, n in self.found.most_common() if s.reason is None]

    def __enter__(self) -> HostSyncs:
        for name in READS:
            self._methods[name] = getattr(Tensor, name)
            setattr(Tensor, name, self._reading(name, self._methods[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(Tensor, name, method)

    def _reading(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            outermost, self._inside = not self._inside, True
            try:
                if outermost and tensor.device == self.device:
                    self._note(name.strip("_"))
                return method(tensor, *args, **kwargs)
            finally:
                self._inside = not outermost

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not self._inside:
            if name in READING_OPS:
                on = args[0].device if args and isinstance(args[0], Tensor) else self.device
                if on == self.device:
                    self._note(name.removeprefix("aten::"))
            elif name == "aten::index" and _by_mask(args):
                self._note("index by a mask")
            elif self.device.type == "cuda" and _to_host(name, args, kwargs or {}):
                self._note("copy to the host")
        return func(*args, **(kwargs or {}))

    def _note(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        place, ours = None, ""
        while frame is not None:
            file = _package_path(frame.f_code.co_filename)
            if place is None and not file.startswith("torch/") and not file.endswith(_THIS):
                place = file, frame.f_lineno, frame.f_code.co_name
            if file.startswith("fastrepa/") and not file.endswith(_THIS):
                ours = f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
                break
            frame = frame.f_back
        self.found[HostSync(what, *(place or ("?", 0, "?")), ours, self.region())] += 1


_THIS = "commands/profile/host_syncs.py"


def _by_mask(args: Any) -> bool:
    kinds = (torch.bool, torch.uint8)
    return any(isinstance(i, Tensor) and i.dtype in kinds for i in args[1])


def _to_host(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """A blocking copy from the device, which no method of READS made."""
    if name == "aten::_to_copy":
        to = kwargs.get("device")
        return (
            args[0].is_cuda
            and to is not None
            and torch.device(to).type == "cpu"
            and not kwargs.get("non_blocking", False)
        )
    if name == "aten::copy_":
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return blocking and args[1].is_cuda and args[0].device.type == "cpu"
    return False


def _package_path(file: str) -> str:
    """A file by its package: fastrepa/training/optimizer.py."""
    for root in ("site-packages/", "engine/", "kernels/"):
        if root in file:
            return file.rpartition(root)[2]
    return file
