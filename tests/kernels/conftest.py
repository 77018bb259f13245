"""The places where kernel tests run, and buffers that show what was never written.

`pytest -m gpu` runs the same tests on a CUDA device (T3), as they have run on an H200
(benchmarks/records/gpu_suite_h200.jsonl).

Without a GPU the kernels run in Triton's interpreter. TRITON_INTERPRET must be set before triton
is imported by anything in the process; outside these tests it changes nothing, because launch.py
gives CPU tensors the torch path.
"""

import os
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastrepa_kernels import launch
from fastrepa_kernels.attention import backends, choice


@dataclass(frozen=True)
class Place:
    """A device, the dtype of the half-precision (or fp32) operands, and the forced backend."""

    device: str
    dtype: torch.dtype
    backend: str

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)


# In the interpreter bf16 arithmetic is wrong and a fp32 -> bf16 store truncates: bf16 is for GPUs.
PLACES = {
    "torch-fp32": Place("cpu", torch.float32, "torch"),
    "torch-bf16": Place("cpu", torch.bfloat16, "torch"),
    "interpreter-fp32": Place("cpu", torch.float32, "triton"),
    "interpreter-fp16": Place("cpu", torch.float16, "triton"),
    "cuda-fp32": Place("cuda", torch.float32, "auto"),
    "cuda-fp16": Place("cuda", torch.float16, "auto"),
    "cuda-bf16": Place("cuda", torch.bfloat16, "auto"),
}


def _params(*prefixes):
    return [
        pytest.param(name, marks=[pytest.mark.gpu] if name.startswith("cuda") else [])
        for name in PLACES
        if name.startswith(prefixes)
    ]


def _enter(name):
    chosen = PLACES[name]
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name.startswith("interpreter"):
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled for the GPU in this process")
        import triton

        interpreted = type(triton.jit(lambda: None)).__name__ == "InterpretedFunction"
        first = type(triton.language.standard.sum).__name__ == "InterpretedFunction"
        assert interpreted and first, (
            "triton was imported before TRITON_INTERPRET was set: set it in tests/conftest.py"
        )
    return chosen


@pytest.fixture(params=_params("torch", "interpreter", "cuda"))
def place(request):
    """Every path: the torch path, the kernels in the interpreter, the kernels on a GPU."""
    chosen = _enter(request.param)
    torch.manual_seed(20)
    with launch.backend(chosen.backend):
        yield chosen


@pytest.fixture(params=["torch-fp32", *_params("interpreter-fp32", "cuda-fp32")])
def place_fp32(request):
    """Every path once, in fp32: for properties that do not depend on the dtype."""
    chosen = _enter(request.param)
    torch.manual_seed(21)
    with launch.backend(chosen.backend):
        yield chosen


# `torch.device` as a context notes, once and for all, which functions make tensors: torch's own,
# not those that the fixture below puts in their place while something compiles.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Whatever an operation fails to write stays NaN and is seen."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            t = allocate(*args, **kwargs)
            if not t.is_floating_point() or t.is_meta:
                return t
            with torch.no_grad():  # Inductor's pattern matcher makes leaves with it
                return t.fill_(float("nan"))

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def unpoisoned(launches: list[str]) -> list[str]:
    """A list of launches (tests/launches.py) without those that `poisoned_buffers` made."""
    return [name for name in launches if name != "aten.fill_.Scalar"]


@pytest.fixture
def another_machine():
    """Forget what was found out about attention: the next test's machine is another."""
    torch.manual_seed(22)
    refusal, loaded = choice._refusal, dict(backends._loaded)
    refusal.cache_clear()
    yield
    refusal.cache_clear()
    backends._loaded.clear()
    backends._loaded.update(loaded)
