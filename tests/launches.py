"""Counting, without a GPU, what a piece of code would launch on one.

`with counted() as launches:` fills a list with a name for every launch: `aten.mul.Tensor` for an
operation of torch that computes or copies, the kernel's name for a Triton kernel. What only makes
a view, allocates or asks for metadata launches nothing. Our own operations (`fastrepa::`) are
looked into: their launches count, not they. Under `launch.backend("triton")` the kernels that a GPU
would run are the ones counted, in Triton's interpreter.

A value that the host reads is in the list, too, as `SYNC`: it waits for the device. An operation of
torch counts once, though on a GPU a few launch more (a long `cat`, a `_foreach_` of many tensors).
A graph that Inductor compiled is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# For a test that forces Triton on CPU tensors: with a GPU at hand nothing is interpreted.
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for the GPU in this process"
)

SYNC = "aten._local_scalar_dense.default"

# Neither computes nor copies, and its schema does not say so.
_FREE = {
    "aten.empty.memory_format", "aten.empty_like.default", "aten.empty_strided.default",
    "aten.new_empty.default", "aten.new_empty_strided.default", "aten._unsafe_view.default",
    "aten.set_.source_Storage", "aten.set_.source_Tensor", "aten.resize_.default",
    "aten.record_stream.default", "prim.device.default",
}  # fmt: skip


class _Trace(TorchDispatchMode):
    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastrepa":
            with self:  # its body, not the operation: that would come back here
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        with self:  # an operation's body meets here what autograd would have taken apart: `.to`
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if not func.is_view and str(func) not in _FREE:
            self.launches.append(str(func))
        return func(*args, **kwargs)


@contextmanager
def counted() -> Iterator[list[str]]:
    """A list of the names of what the block launches, as it launches it (this module's text)."""
    launches: list[str] = []

    def counting(run: Any) -> Any:
        def call(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if not warmup:
                launches.append(kernel.__name__)
            with _disable_current_modes():  # the interpreter computes with torch itself
                return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        return call

    with (
        mock.patch.object(InterpretedFunction, "run", counting(InterpretedFunction.run)),
        mock.patch.object(JITFunction, "run", counting(JITFunction.run)),
        _Trace(launches),
    ):
        yield launches


def run_compiling(*words: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these words where Triton compiles, as it does not with TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
