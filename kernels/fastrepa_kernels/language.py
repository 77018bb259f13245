"""Triton, and its language `tl`, where they are installed.

Elsewhere (wheels for CPUs alone, macOS) stand-ins take what modules say while they are imported, so
that the torch paths are there. Nothing is launched without Triton: `launch.use_triton` refuses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class _Absent:
    """The stand-in for triton and for tl, as far as a module of kernels asks before a launch."""

    def jit(self, kernel: Any = None, **how: Any) -> Any:
        return kernel or self.jit

    def constexpr(self, value: Any) -> Any:
        return SimpleNamespace(value=value)

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":  # it is there, and broken
        raise
    triton = tl = _Absent()

INSTALLED = not isinstance(triton, _Absent)
